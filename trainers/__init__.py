"""What a stage computes: tensors, tokens and losses. Knows no Ray and no MLflow."""

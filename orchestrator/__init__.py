"""What runs where and when: knows Ray and MLflow, knows no tensors."""

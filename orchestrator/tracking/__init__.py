"""The MLflow view of a sweep."""

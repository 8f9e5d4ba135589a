"""Base models: loading, saving, attention, unembedding, layouts, and built-in tiny ones."""

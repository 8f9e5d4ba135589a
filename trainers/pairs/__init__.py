"""Preference pairs as tokens, and as the micro-batches of a step."""

"""Scoring preference pairs with a trained model: `python -m trainers.evaluate`."""

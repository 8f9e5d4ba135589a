"""Training a reward model: `python -m trainers.train`."""

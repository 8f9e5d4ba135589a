"""Preference data: where pairs come from and what a pair is."""

"""Artifacts by content key, the records of a sweep, and leases."""

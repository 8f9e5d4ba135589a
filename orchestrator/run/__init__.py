"""One trial from start to end: stages computed, retries, events; in this process."""

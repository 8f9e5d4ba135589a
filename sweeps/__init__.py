"""One file per experiment; each declares a Sweep and is a command."""

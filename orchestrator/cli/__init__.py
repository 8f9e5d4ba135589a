"""The command line: flags, commands, and what the terminal shows."""

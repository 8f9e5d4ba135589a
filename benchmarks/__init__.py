"""Commands that measure speed and memory and print tables; none is a test."""

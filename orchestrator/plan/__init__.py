"""What would run where, in how much memory, how long and at what price: pure functions."""

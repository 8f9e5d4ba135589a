"""What is asked for: trials, models, data sets, stages and their keys."""

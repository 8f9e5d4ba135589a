"""The paper's theory (paper §5) as functions to check: learning dynamics, its two theorems, hidden representations."""

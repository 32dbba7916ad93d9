"""Log-probs of completions and their gradient, at the least memory and time."""

"""Log-probs under the model that a run compares with."""

"""One optimiser step: the gradient of a step batch, and the update."""

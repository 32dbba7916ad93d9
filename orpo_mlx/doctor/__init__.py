"""`orpo-mlx doctor`: what this package does on this machine, checked and measured."""

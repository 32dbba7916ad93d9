"""The functions that stand in for mlx-lm's, and the proof that they give the same."""

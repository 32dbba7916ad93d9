"""The commands of `orpo-mlx`, one file each: flags, text and exit status."""

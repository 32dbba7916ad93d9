"""A checkpoint's config and weights as they are stored, brought into mlx-lm's form."""

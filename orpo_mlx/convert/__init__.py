"""Checkpoints and adapters of other programs, in and out."""

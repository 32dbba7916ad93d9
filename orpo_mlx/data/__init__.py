"""Preference pairs: read, recognised, tokenized, truncated and batched."""

"""Rounds of pairs, training and evaluation from one config, resumable at any moment."""

"""Replies judged: which of two models answers better, and how sure that is."""

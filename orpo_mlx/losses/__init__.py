"""Losses of preference alignment."""

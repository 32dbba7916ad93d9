"""Judges: rules, local models, endpoints, and how their verdicts are read."""

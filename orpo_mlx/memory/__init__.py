"""The memory of a run: predicted, chosen and measured."""

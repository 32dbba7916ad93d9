"""What is looked at between steps: held-out metrics, replies, and whether a run still learns."""

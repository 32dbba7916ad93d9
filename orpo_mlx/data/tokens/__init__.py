"""Text to token ids: templates, boundaries, truncation, and the store on disk."""

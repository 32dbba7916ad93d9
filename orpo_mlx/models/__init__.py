"""Models and adapters: found, loaded and changed."""

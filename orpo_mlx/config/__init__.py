"""Settings of a run: declared, checked, and read from flags and files."""

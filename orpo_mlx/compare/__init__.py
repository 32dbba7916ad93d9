"""Methods trained side by side under one budget, and what their results say."""

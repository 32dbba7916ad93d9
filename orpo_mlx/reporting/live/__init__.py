"""The page that draws a run while it trains."""

"""What a run tells: console, metrics, charts, pages, model card, trackers, Hub."""

"""Names of what a folder of adapters holds, a run's above all, for all who write it or read it."""

from __future__ import annotations

ADAPTERS_FILE = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for `ADAPTERS_FILE`."""
ADAPTER_CONFIG_FILE = "adapter_config.json"
"""What goes with either, as mlx-lm and PEFT call it."""
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
LEFT_OUT_FILE = "left_out.txt"
CARD_FILE = "README.md"
REPORT_PAGE = "report.html"
REPORT_PICTURE = "report.png"
CHECKPOINTS = "checkpoints"
BEST = "best"
"""A link to the best one of `CHECKPOINTS`."""

"""What settings call models, dtypes and kinds of fine-tuning. mlx-lm is not imported here."""

from __future__ import annotations

import mlx.core as mx

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

FINE_TUNE_TYPES = ("lora", "dora", "full")

FLOAT16_IN_FLOAT32 = "float16-in-float32"
"""Weights of a float16's precision, run in float32: what a quantised file gives on the layers that run it quantised."""
LOAD_DTYPES = (*DTYPES, FLOAT16_IN_FLOAT32)
"""What a model can be loaded as."""

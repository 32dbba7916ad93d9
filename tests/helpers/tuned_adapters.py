"""Adapters that have learnt to give one answer, in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import SMALL, write_rows
from tests.helpers.quiet_training import run_quietly

PROMPT, ANSWER = "Say it.", "Sure."


def tuned_adapters(folder: Path, model: Path, **settings: Any) -> Path:
    """Train on one pair until the tiny model answers `PROMPT` with `ANSWER`; the adapter folder."""
    data = folder / "data"
    for split in ("train", "valid", "test"):
        write_rows(data / f"{split}.jsonl", [{"prompt": PROMPT, "chosen": ANSWER, "rejected": "no"}] * 2)
    adapters = folder / "adapters"
    values = {**SMALL, "method": "sft", "iters": 60, "learning_rate": 1e-2, "steps_per_report": 50, **settings}
    values |= {"model": str(model), "data": str(data), "adapter_path": str(adapters)}
    run_quietly(values)
    return adapters

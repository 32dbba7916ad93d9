"""What a run says before its first step."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from orpo_mlx.config.flags import with_flags
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.training.summaries import announce_evaluation


def test_pairs_that_are_passed_over_are_said_with_the_flag_that_takes_them() -> None:
    splits = {name: SimpleNamespace(pairs=list(range(count))) for name, count in (("valid", 8), ("test", 9))}
    out = io.StringIO()
    run: Any = SimpleNamespace(splits=splits, config=SimpleNamespace(val_batches=2, test_batches=2, batch_size=4))
    announce_evaluation(run, Reporter(Console(file=out, width=200), render=with_flags))
    assert out.getvalue() == "Of 9 test pairs the first 8 are evaluated; --test-batches -1 takes all.\n"

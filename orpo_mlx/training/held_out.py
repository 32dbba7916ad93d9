"""The held-out splits of a run evaluated, written down and said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from orpo_mlx.process_memory import clear_cache_above
from orpo_mlx.reporting.console import MetricsFile, Reporter, eval_line
from orpo_mlx.training.checkpoints.progress import Held
from orpo_mlx.training.data_order import held_out_pairs
from orpo_mlx.training.evaluation import evaluate
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.prepare import Run
from orpo_mlx.types import TokenizedPair

Validated = Callable[[int, Mapping[str, float], float], object]
"""Told of the step, the metrics and the seconds of a validation."""


def evaluate_splits(
    run: Run,
    names: Sequence[str],
    *,
    step: int,
    untrained: bool,
    reporter: Reporter,
    metrics_file: MetricsFile,
    stop: StopSignals,
    told: Validated = lambda step, metrics, seconds: None,
) -> Held:
    """Evaluate the held-out splits among `names`.

    Args:
        run: with the weights to judge.
        names: splits; those that the run has not are passed over.
        step: the step these weights are of.
        untrained: whether the policy is still the reference.
        reporter: where it is said.
        metrics_file: where it is written down.
        stop: how it is asked to end.
        told: called after the valid split.
    """
    held: Held = {}
    for name, pairs in held_out_pairs(run).items():
        if name not in names:
            continue
        suspects: list[TokenizedPair] = []
        started = time.perf_counter()
        with reporter.bar(f"evaluating {name}", len(pairs), "pairs") as advance:

            def progress(done: int, advance: Callable[[int], None] = advance) -> None:
                advance(done)
                clear_cache_above(run.config.clear_cache_threshold)
                if run.ranks.size == 1:
                    stop.check()

            held[name] = evaluate(
                run.scorer, pairs, run.method.loss, batch_size=run.config.batch_size, nll=run.config.nll,
                reference=run.reference, untrained=untrained, progress=progress, suspects=suspects.extend,
                ranks=run.ranks,
            )  # fmt: skip
        metrics_file.write(step, name, held[name])
        reporter.figures(eval_line(step, name, held[name]))
        if suspects:
            places = ", ".join(pair.place for pair in suspects[:4])
            reporter.say(f"Warning: not finite at step {step} on {len(suspects)} {name} pairs: {places}.")
        if name == "valid":
            told(step, held[name], max(time.perf_counter() - started, 0.0))
    return held

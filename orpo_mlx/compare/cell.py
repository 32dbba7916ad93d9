"""One cell of a comparison, run in a process of its own: a training, or a judgement on held-out pairs."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from orpo_mlx.compare.pair_sets import Pairs, judged_pair, relabel, spread_out, three_splits
from orpo_mlx.compare.plan import PROG, Budget
from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.flags import exit_status
from orpo_mlx.data.batching import TrainingOrder, micro_batches, steps_per_epoch
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.errors import TrainingError
from orpo_mlx.files import save_adapters, save_json
from orpo_mlx.judging.divergence import distinct_n, sampled_kl
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.process_memory import configure_allocator, process_footprint
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE, METRICS_FILE
from orpo_mlx.training.data_order import pairs_per_step
from orpo_mlx.training.evaluating.samples import pick_prompts, sample_replies
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.run import Run, adapter_config, versions
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.types import Group, Pair

_GIB = 2**30
# Few enough that a batch's states stay small beside the model, on any machine.
_PAIRS_SCORED_TOGETHER = 8
REPLIES = 10
KL_REPLIES = 10

ReportShare = Callable[[float], None]
"""Takes the share of a cell that is done."""


def run_cell(spec: dict[str, Any], report_share: ReportShare) -> None:
    """Run what `spec` says and write the result, with its identity, to `spec["output"]`."""
    result = (train_cell if spec["kind"] == "train" else test_cell)(spec, report_share)
    save_json(Path(spec["output"]), {"spec": spec["identity"], **result})


def train_cell(spec: dict[str, Any], report_share: ReportShare) -> dict[str, Any]:
    """Train one method under one seed, learning rate and β until the budget is spent; docs/results.md has the keys."""
    configure_allocator()
    run = prepare(resolve(spec["argv"], PROG))
    splits = three_splits(run)
    valid = spread_out(splits["valid"], spec["valid_pairs"])
    facts = train_facts(run, splits, len(valid))
    # Not within the first step, whose time is measured.
    run.optimizer.init(run.loaded.model.trainable_parameters())
    metrics = MetricsFile(run.folder / METRICS_FILE)
    clock = Clock()
    curve: list[dict[str, float]] = []
    try:
        for step, indices in enumerate(training_order(run, splits["train"]), 1):
            pairs = [splits["train"][index] for index in indices]
            report = clock.step(run, relabel(pairs, spec["labels"], step, run.config.seed), step)
            metrics.write(step, "train", report)
            spent = Budget(*spec["budget"]).share(step, clock.pair_tokens, clock.seconds)
            report_share(min(spent, 1.0))
            if spent >= (len(curve) + 1) / spec["curve_points"] or spent >= 1:
                point = judge(run, valid)
                curve.append({"step": step, "seconds": clock.seconds, "pair_tokens": clock.pair_tokens, **point})
                named = {"accuracies/mean_logps": point["accuracy"], "nll_loss": point["nll"]}
                metrics.write(step, "valid", named)
            if spent >= 1:
                break
    except TrainingError as error:
        # A rate that is too high is a result, and no end of the comparison.
        return {**facts, "failed": str(error)}
    finally:
        metrics.close()
    save_adapters(run.folder, adapter_weights(run.loaded.model))
    save_json(run.folder / ADAPTER_CONFIG_FILE, adapter_config(run))
    return {**facts, **clock.figures(), "curve": curve}


def train_facts(run: Run, splits: dict[str, Pairs], valid_pairs: int) -> dict[str, Any]:
    """What is known of a training before its first step, and must be the same for the methods that are compared."""
    # The order has no end; its first epoch stands for all of it.
    first_epoch = itertools.islice(
        training_order(run, splits["train"]), steps_per_epoch(len(splits["train"]), pairs_per_step(run.config))
    )
    return {
        "method_parameters": run.method.parameters,
        "memory_mode": run.memory.mode,
        "initial_adapter_sha256": weights_digest(run),
        "order_sha256": hashlib.sha256(json.dumps(list(first_epoch)).encode()).hexdigest(),
        "data_sha256": {name: split.sha256 for name, split in run.splits.items()},
        "pairs": {name: len(pairs) for name, pairs in splits.items()},
        "valid_pairs": valid_pairs,
        "versions": versions(),
    }


def training_order(run: Run, pairs: Pairs) -> TrainingOrder:
    """The step batches of a cell, which may have held some of the train split out."""
    return TrainingOrder(pairs, pairs_per_step(run.config), seed=run.config.seed, shuffle=run.config.shuffle)


def weights_digest(run: Run) -> str:
    """A hash of the trainable parameters' names and values."""
    digest = hashlib.sha256()
    for name, array in sorted(adapter_weights(run.loaded.model).items()):
        digest.update(name.encode())
        # NumPy has no bfloat16, and float32 holds each of its values exactly.
        digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


class Clock:
    """Steps with their seconds, tokens and peaks."""

    def __init__(self) -> None:
        self.pair_tokens = 0
        self.pairs = 0
        self.steps_s: list[float] = []
        self.reference_s = 0.0
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.peak = 0

    @property
    def seconds(self) -> float:
        """Of training so far: reference log-probs and steps."""
        return self.reference_s + sum(self.steps_s)

    def step(self, run: Run, step_batch: Pairs, step: int) -> dict[str, float]:
        """One step; what `metrics.jsonl` has to say of it."""
        run.loaded.model.train()
        # The peak of this step alone: evaluation between steps is no part of what training takes.
        mx.reset_peak_memory()
        started = time.perf_counter()
        if run.reference is not None:
            # Right before the step, to be timed apart; in its micro-batches, so that the reference's sums are the very
            # same floating-point sums.
            run.reference.remember(micro_batches(step_batch, run.config.batch_size, run.config.micro_batch_tokens))
        begun = time.perf_counter()
        means = optimiser_step(run, step_batch, step).means()
        ended = time.perf_counter()
        self.reference_s += begun - started
        self.steps_s.append(ended - begun)
        tokens = sum(pair.pair_tokens for pair in step_batch)
        self.pair_tokens += tokens
        self.pairs += len(step_batch)
        self.peak = max(self.peak, mx.get_peak_memory())
        self.losses.append(means["loss"])
        # Of single completions, how often the reward tells good from bad: they have no pairs.
        told = [means[key] for key in ("accuracies/mean_logps", "rewards/accuracies") if key in means]
        self.accuracies += told[:1]
        return {**means, "pair_tokens_per_s": tokens / (ended - started), "peak_memory_gib": self.peak / _GIB}

    def figures(self) -> dict[str, Any]:
        """What the training took."""
        return {
            "steps": len(self.steps_s),
            "pairs_seen": self.pairs,
            "pair_tokens": self.pair_tokens,
            "training_s": self.seconds,
            "reference_s": self.reference_s,
            "step_s_median": statistics.median(self.steps_s),
            "pair_tokens_per_s": self.pair_tokens / self.seconds,
            "peak_memory_gib": self.peak / _GIB,
            "cache_memory_gib": mx.get_cache_memory() / _GIB,
            "footprint_peak_gib": process_footprint().peak_gib,
            "losses": self.losses,
            "accuracies": self.accuracies,
        }


def test_cell(spec: dict[str, Any], report_share: ReportShare) -> dict[str, Any]:
    """Judge adapters (or, without any, the base model) on the test pairs; docs/results.md has the keys."""
    configure_allocator()
    run = prepare(resolve(spec["argv"], PROG))
    splits = three_splits(run)
    test = spread_out(splits["test"], spec["test_pairs"])
    rows = score(run, test)
    # Roughly how a judgement's time is spent: log-probs, sampled replies, greedy replies.
    report_share(0.6)
    found: dict[str, Any] = {
        **means_of(rows),
        "pairs": len(test),
        "wins_mean": [int(row["margin"] > 0) for row in rows],
        "wins_sum": [int(row["chosen_logps"] > row["rejected_logps"]) for row in rows],
    }
    if spec["kind"] == "base":
        found["valid"] = judge(run, spread_out(splits["valid"], spec["valid_pairs"]))
    else:
        prompts = [pair.prompt_ids for pair in spread_out(test, KL_REPLIES)]
        divergence = sampled_kl(
            run.loaded.model, prompts, stop_tokens(run), seed=run.config.seed, max_tokens=run.config.sample_tokens
        )
        found["kl"] = divergence._asdict()
    report_share(0.8)
    return {**found, **greedy_replies(run, test)}


def greedy_replies(run: Run, test: Pairs) -> dict[str, Any]:
    """Replies to some of the test prompts, their mean length and how varied they are."""
    tokenizer = run.loaded.tokenizer
    prompts = pick_prompts(pairs_as_text(run, test), REPLIES) if tokenizer is not None else []
    templated = run.config.template_strings
    replies = sample_replies(run.loaded.model, tokenizer, prompts, run.config.sample_tokens, template_strings=templated)
    return {
        "replies": [reply._asdict() for reply in replies],
        "reply_tokens": statistics.fmean(reply.tokens for reply in replies) if replies else None,
        "distinct_2": distinct_n([reply.text for reply in replies]),
    }


def judge(run: Run, pairs: Pairs) -> dict[str, float]:
    """Accuracies, margin and NLL on held-out pairs."""
    return means_of(score(run, pairs))


def score(run: Run, pairs: Pairs) -> list[dict[str, Any]]:
    """A row of log-probs for each pair, of a group for its best and worst completion."""
    run.loaded.model.eval()
    return score_pairs(run.scorer, list(map(judged_pair, pairs)), batch_size=_PAIRS_SCORED_TOGETHER)


def means_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracies, margin (nats per token) and NLL of the chosen side over scored pairs."""
    return {
        "accuracy": statistics.fmean(row["margin"] > 0 for row in rows),
        "accuracy_sum": statistics.fmean(row["chosen_logps"] > row["rejected_logps"] for row in rows),
        "margin": statistics.fmean(row["margin"] for row in rows),
        "nll": statistics.fmean(-row["chosen_mean_logps"] for row in rows),
    }


def stop_tokens(run: Run) -> set[int]:
    """The tokens that end a reply; of a model without a tokenizer, those of its config."""
    if run.loaded.tokenizer is not None:
        return set(run.loaded.tokenizer.eos_token_ids)
    found = run.loaded.config.get("eos_token_id")
    if isinstance(found, list):
        return set(found)
    return set() if found is None else {found}


def pairs_as_text(run: Run, test: Pairs) -> list[Pair | Group]:
    """The test pairs as text, where their rows are text."""
    locations = {pair.location for pair in test}
    split = run.splits["test" if "test" in run.splits else "train"]
    return [pair for pair in split.raw() if pair.location in locations]


def main() -> None:
    """Run the cell that the parent process describes as JSON, and tell it on stdout how far it is."""
    run_cell(json.loads(sys.argv[1]), lambda share: print(json.dumps({"progress": share}), flush=True))


if __name__ == "__main__":
    sys.exit(exit_status(PROG, main))

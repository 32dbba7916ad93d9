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
from typing import Any, overload

import mlx.core as mx
import numpy as np

from orpo_mlx.compare.divergence import distinct_n, sampled_kl
from orpo_mlx.compare.plan import PROG, Budget
from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.flags import exit_status
from orpo_mlx.data.batching import TrainingOrder, micro_batches
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.errors import TrainingError
from orpo_mlx.files import save_adapters, save_json
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.process_memory import process_footprint, settle
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.run import Run, adapter_config, versions
from orpo_mlx.training.samples import MAX_TOKENS, pick_prompts, sample_replies
from orpo_mlx.training.step import optimiser_step
from orpo_mlx.types import Pair, TokenizedPair

_GIB = 2**30
_HELD_OUT_EVERY = 5
_SCORED_TOGETHER = 8
REPLIES = 10
KL_REPLIES = 10

Pairs = Sequence[TokenizedPair]
Progress = Callable[[float], None]


class Picked(Sequence[TokenizedPair]):
    """Some of a sequence's pairs, read when they are asked for."""

    def __init__(self, pairs: Pairs, indices: Sequence[int]) -> None:
        self._pairs, self._indices = pairs, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | Pairs:
        if isinstance(index, slice):
            return Picked(self._pairs, self._indices[index])
        return self._pairs[self._indices[index]]


def three_splits(run: Run) -> dict[str, Pairs]:
    """Pairs to train on, to choose learning rates on, and to judge by.

    A missing valid or test split is made of every fifth pair of train (of what is left of it), which is then not
    trained on.

    Raises:
        TrainingError: too few pairs to make it of.
    """
    found: dict[str, Pairs] = {name: split.pairs for name, split in run.splits.items()}
    for name in ("test", "valid"):
        if name not in found:
            pairs = found["train"]
            away = set(range(_HELD_OUT_EVERY - 1, len(pairs), _HELD_OUT_EVERY))
            if not away:
                raise TrainingError(f"{run.config.data}: {len(pairs)} pairs are too few to hold some out as {name}")
            found[name] = Picked(pairs, sorted(away))
            found["train"] = Picked(pairs, [index for index in range(len(pairs)) if index not in away])
    return found


def spread_out(pairs: Pairs, most: int) -> Pairs:
    """At most `most` pairs (-1: all), spread evenly."""
    if most == -1 or most >= len(pairs):
        return pairs
    return Picked(pairs, [(2 * number + 1) * len(pairs) // (2 * most) for number in range(most)])


def relabel(window: Sequence[TokenizedPair], labels: str, step: int, seed: int) -> list[TokenizedPair]:
    """A window with its labels as they were given, all swapped, or half of them swapped at random.

    Half of every window, not a coin for every pair: at a small budget the coins alone would favour a side.
    """
    if labels == "given":
        return list(window)
    generator = np.random.default_rng((seed, step))
    half = (len(window) + int(generator.integers(2))) // 2
    turned = range(len(window)) if labels == "swapped" else generator.permutation(len(window))[:half].tolist()
    return [_turned(pair) if number in set(turned) else pair for number, pair in enumerate(window)]


def train_cell(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train one method under one seed, learning rate and β until the budget is spent; docs/results.md has the keys.

    Reference log-probs of a step's pairs are computed right before the step, and timed apart.
    """
    settle()
    config = resolve(spec["words"], PROG)
    run = prepare(config)
    splits = three_splits(run)
    valid = spread_out(splits["valid"], spec["valid_pairs"])
    size = config.batch_size * config.grad_accumulation_steps
    order = TrainingOrder(splits["train"], size, seed=config.seed, shuffle=config.shuffle)
    first_epoch = list(itertools.islice(order, -(-len(splits["train"]) // size)))
    facts = {
        "method_parameters": run.method.parameters,
        "memory_mode": run.memory.mode,
        "initial_adapter_sha256": weights_digest(run),
        "order_sha256": hashlib.sha256(json.dumps(first_epoch).encode()).hexdigest(),
        "data_sha256": {name: split.sha256 for name, split in run.splits.items()},
        "pairs": {name: len(pairs) for name, pairs in splits.items()},
        "valid_pairs": len(valid),
        "versions": versions(),
    }
    run.optimizer.init(run.loaded.model.trainable_parameters())
    metrics = MetricsFile(run.folder / "metrics.jsonl")
    budget, clock = Budget(*spec["budget"]), _Clock()
    curve: list[dict[str, float]] = []
    order = TrainingOrder(splits["train"], size, seed=config.seed, shuffle=config.shuffle)
    try:
        for step, indices in enumerate(order, 1):
            window = relabel([splits["train"][index] for index in indices], spec["labels"], step, config.seed)
            report = clock.step(run, window, step)
            metrics.write(step, "train", report)
            spent = budget.share(step, clock.pair_tokens, clock.seconds)
            progress(min(spent, 1.0))
            if spent >= (len(curve) + 1) / spec["curve_points"] or spent >= 1:
                curve.append(
                    {"step": step, "seconds": clock.seconds, "pair_tokens": clock.pair_tokens, **judge(run, valid)}
                )
                held = {"accuracies/mean_logps": curve[-1]["accuracy"], "nll_loss": curve[-1]["nll"]}
                metrics.write(step, "valid", held)
            if spent >= 1:
                break
    except TrainingError as error:
        return {**facts, "failed": str(error)}
    finally:
        metrics.close()
    save_adapters(run.folder, adapter_weights(run.loaded.model))
    save_json(run.folder / "adapter_config.json", adapter_config(run))
    return {**facts, **clock.figures(), "curve": curve}


def test_cell(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Judge adapters (or, without any, the base model) on the test pairs; docs/results.md has the keys."""
    settle()
    run = prepare(resolve(spec["words"], PROG))
    splits = three_splits(run)
    test = spread_out(splits["test"], spec["test_pairs"])
    rows = _rows(run, test)
    progress(0.6)
    found: dict[str, Any] = {**_figures(rows), "pairs": len(test)}
    found["wins_mean"] = [int(row["margin"] > 0) for row in rows]
    found["wins_sum"] = [int(row["chosen_logps"] > row["rejected_logps"]) for row in rows]
    model, tokenizer = run.loaded.model, run.loaded.tokenizer
    if spec["kind"] == "base":
        found["valid"] = judge(run, spread_out(splits["valid"], spec["valid_pairs"]))
    else:
        stop = set(tokenizer.eos_token_ids) if tokenizer is not None else _eos(run.loaded.config)
        prompts = [pair.prompt_ids for pair in spread_out(test, KL_REPLIES)]
        found["kl"] = sampled_kl(model, prompts, stop, seed=run.config.seed, max_tokens=MAX_TOKENS)._asdict()
    progress(0.8)
    raw = pick_prompts(_texts(run, test), REPLIES) if tokenizer is not None else []
    replies = sample_replies(model, tokenizer, raw)
    found["replies"] = [reply._asdict() for reply in replies]
    found["reply_tokens"] = statistics.fmean(reply.tokens for reply in replies) if replies else None
    found["distinct_2"] = distinct_n([reply.text for reply in replies])
    return found


def judge(run: Run, pairs: Pairs) -> dict[str, float]:
    """Accuracies, margin and NLL on held-out pairs."""
    return _figures(_rows(run, pairs))


def weights_digest(run: Run) -> str:
    """A hash of the trainable parameters' names and values."""
    digest = hashlib.sha256()
    for name, array in sorted(adapter_weights(run.loaded.model).items()):
        digest.update(name.encode())
        digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


class _Clock:
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
        return self.reference_s + sum(self.steps_s)

    def step(self, run: Run, window: Sequence[TokenizedPair], step: int) -> dict[str, float]:
        """One step; what `metrics.jsonl` has to say of it."""
        run.loaded.model.train()
        mx.reset_peak_memory()
        started = time.perf_counter()
        if run.reference is not None:
            run.reference.remember(micro_batches(window, run.config.batch_size, run.config.micro_batch_tokens))
        begun = time.perf_counter()
        means = optimiser_step(run, window, step).means()
        ended = time.perf_counter()
        self.reference_s += begun - started
        self.steps_s.append(ended - begun)
        tokens = sum(pair.pair_tokens for pair in window)
        self.pair_tokens += tokens
        self.pairs += len(window)
        self.peak = max(self.peak, mx.get_peak_memory())
        self.losses.append(means["loss"])
        self.accuracies.append(means["accuracies/mean_logps"])
        return {**means, "pair_tokens_per_s": tokens / (ended - started), "peak_memory_gib": self.peak / _GIB}

    def figures(self) -> dict[str, Any]:
        footprint = process_footprint()
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
            "footprint_peak_gib": footprint.peak_gib,
            "losses": self.losses,
            "accuracies": self.accuracies,
        }


def _turned(pair: TokenizedPair) -> TokenizedPair:
    return pair._replace(chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)


def _rows(run: Run, pairs: Pairs) -> list[dict[str, Any]]:
    run.loaded.model.eval()
    return score_pairs(run.scorer, pairs, batch_size=_SCORED_TOGETHER)


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        "accuracy": statistics.fmean(row["margin"] > 0 for row in rows),
        "accuracy_sum": statistics.fmean(row["chosen_logps"] > row["rejected_logps"] for row in rows),
        "margin": statistics.fmean(row["margin"] for row in rows),
        "nll": statistics.fmean(-row["chosen_mean_logps"] for row in rows),
    }


def _eos(config: dict[str, Any]) -> set[int]:
    found = config.get("eos_token_id")
    return set(found) if isinstance(found, list) else set() if found is None else {found}


def _texts(run: Run, test: Pairs) -> list[Pair]:
    """The test pairs as text, where their rows are text."""
    places = {pair.location for pair in test}
    split = run.splits["test" if "test" in run.splits else "train"]
    return [pair for pair in split.raw() if pair.location in places]


def run_cell(spec: dict[str, Any], progress: Progress) -> None:
    """Run what `spec` says and write the result, with its identity, to `spec["output"]`."""
    result = (train_cell if spec["kind"] == "train" else test_cell)(spec, progress)
    save_json(Path(spec["output"]), {"spec": spec["identity"], **result})


def _main() -> None:
    run_cell(json.loads(sys.argv[1]), lambda share: print(json.dumps({"progress": share}), flush=True))


if __name__ == "__main__":
    sys.exit(exit_status(PROG, _main))

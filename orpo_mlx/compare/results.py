"""Finished cells, checked against each other and summed up as `results.json`; docs/results.md has the schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.compare.plan import Arm, Plan
from orpo_mlx.errors import TrainingError
from orpo_mlx.judging.intervals import clustered_interval, spread

Results = Mapping[str, Any]
"""What `results.json` holds; docs/results.md has the schema."""


class TrainingKey(NamedTuple):
    """Names a training; equal to the plain tuple of its values."""

    arm: str
    seed: int
    rate: float
    beta_factor: float = 1.0
    labels: str = "given"


class JudgementKey(NamedTuple):
    """Names a judgement on the held-out pairs."""

    arm: str
    seed: int
    labels: str = "given"


_SPREAD_TRAIN = (
    "training_s",
    "reference_s",
    "step_s_median",
    "pair_tokens_per_s",
    "peak_memory_gib",
    "cache_memory_gib",
    "footprint_peak_gib",
    "steps",
    "pair_tokens",
)
_SPREAD_TEST = ("accuracy", "accuracy_sum", "margin", "nll", "reply_tokens", "distinct_2")
# Keys of a training that must be the same for all methods under one seed.
_SAME = ("initial_adapter_sha256", "order_sha256", "data_sha256")


@dataclasses.dataclass
class Cells:
    """Results keyed by arm, seed, rate, beta factor, labels."""

    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    trained: dict[TrainingKey, dict[str, Any]] = dataclasses.field(default_factory=dict)
    tested: dict[JudgementKey, dict[str, Any]] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """The learning rate chosen for each arm."""

    def choose(self, arm: Arm, rates: Sequence[float]) -> None:
        """Choose an arm's learning rate: best accuracy on the valid split, then lowest NLL of the chosen side.

        Raises:
            TrainingError: training failed at every rate.
        """
        # Small sweeps end in ties. Of settings that rank the pairs alike, the one that still models the good answers
        # best is taken.
        finals = {rate: final(self.trained[TrainingKey(arm.name, 0, rate)]) for rate in rates}
        working = {rate: found for rate, found in finals.items() if found is not None}
        if not working:
            raise TrainingError(f"{arm.name}: training failed at every learning rate; give lower `learning_rates`")
        self.rates[arm.name] = min(working, key=lambda rate: (-working[rate]["accuracy"], working[rate]["nll"]))

    def check(self) -> None:
        """Make sure that all cells of a seed began with the same adapters and saw the same data in the same order.

        Raises:
            TrainingError: they did not.
        """
        firsts: dict[int, dict[str, Any]] = {}
        for which, cell in self.trained.items():
            first = firsts.setdefault(which.seed, cell)
            other = next((key for key in _SAME if cell[key] != first[key]), None)
            if other is not None:
                raise TrainingError(
                    f"{which.arm}, seed {which.seed}: its {other} is not that of the other methods, so nothing can be "
                    "compared; was the data changed in between? Give another `output`"
                )


def final(cell: Mapping[str, Any]) -> Mapping[str, float] | None:
    """The last point of a training's curve; None where it failed."""
    return None if "failed" in cell else cell["curve"][-1]


def collect(plan: Plan, cells: Cells) -> dict[str, Any]:
    """What `results.json` holds besides date, command, machine and versions."""
    # Any will do: `Cells.check` has seen that they are the same.
    example = next(iter(cells.trained.values()))
    return {
        "budget": {"kind": plan.budget.kind, "amount": plan.budget.amount, "words": str(plan.budget)},
        "settings": {name: value for name, value in plan.identity.items() if name != "budget"},
        "data": {"sha256": example["data_sha256"], "pairs": example["pairs"]},
        "seeds": plan.seeds,
        "target_accuracy": plan.accuracy,
        "base": {**{k: v for k, v in cells.base.items() if k != "spec"}, **_intervals([cells.base])},
        "methods": [_method(plan, cells, arm) for arm in plan.arms],
        "sanity": [_sanity(cells, arm, labels) for arm in plan.sanity for labels in ("swapped", "shuffled")],
    }


def _method(plan: Plan, cells: Cells, arm: Arm) -> dict[str, Any]:
    rate = cells.rates[arm.name]
    trained = [cells.trained[TrainingKey(arm.name, seed, rate)] for seed in range(plan.seeds)]
    tested = [cells.tested[JudgementKey(arm.name, seed)] for seed in range(plan.seeds)]
    grid = _grid(plan, cells, arm)
    reached = [found["accuracy"] for found in grid if found["accuracy"] is not None]
    return {
        "name": arm.name,
        "needs_reference": arm.needs_reference,
        "copies_reference": arm.copies_reference,
        "parameters": trained[0]["method_parameters"],
        "memory_mode": trained[0]["memory_mode"],
        "learning_rate": rate,
        "grid": grid if len(grid) > 1 else [],
        # None where training failed at a setting: the range of the others would flatter the method.
        "sensitivity": max(reached) - min(reached) if len(grid) > 1 and len(reached) == len(grid) else None,
        "summary": _summary(trained, tested),
        **_intervals(tested),
        "to_target": _to_target(cells.base["valid"]["accuracy"], trained, plan.accuracy),
        "initial_adapter_sha256": [cell["initial_adapter_sha256"] for cell in trained],
        "losses": [cell["losses"] for cell in trained],
        "accuracies": [cell["accuracies"] for cell in trained],
        "curves": [cell["curve"] for cell in trained],
        "wins_mean": [cell["wins_mean"] for cell in tested],
        "wins_sum": [cell["wins_sum"] for cell in tested],
        "replies": tested[0]["replies"],
    }


def _grid(plan: Plan, cells: Cells, arm: Arm) -> list[dict[str, Any]]:
    """What each learning rate and β came to, under the seed that all of them were tried with."""
    return [
        {"learning_rate": key.rate, "beta": None if arm.beta is None else arm.beta * key.beta_factor, **_outcome(cell)}
        for key, cell in sorted(cells.trained.items())
        if key.arm == arm.name and key.seed == 0 and key.labels == "given" and key.rate in plan.rates
    ]


def _summary(trained: Sequence[Mapping[str, Any]], tested: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The spread over seeds of each measure; a measure that no seed has is left out."""
    measures = {key: [cell[key] for cell in trained] for key in _SPREAD_TRAIN}
    measures |= {key: _present(tested, key) for key in _SPREAD_TEST}
    measures["kl_per_reply"] = [cell["kl"]["per_reply"] for cell in tested]
    measures["kl_per_token"] = [cell["kl"]["per_token"] for cell in tested]
    return {key: spread(values)._asdict() for key, values in measures.items() if values}


def _present(cells: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [cell[key] for cell in cells if cell[key] is not None]


def _outcome(cell: Mapping[str, Any]) -> dict[str, Any]:
    found = final(cell)
    if found is None:
        return {"accuracy": None, "nll": None, "margin": None, "failed": cell["failed"]}
    return {key: found[key] for key in ("accuracy", "nll", "margin")}


def _intervals(tested: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "accuracy_interval": clustered_interval([cell["wins_mean"] for cell in tested])._asdict(),
        "accuracy_sum_interval": clustered_interval([cell["wins_sum"] for cell in tested])._asdict(),
    }


def _to_target(base: float, trained: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Steps and seconds of each seed's first validation with the target accuracy, None where it never was."""
    if base >= target:
        return {"steps": [0.0] * len(trained), "seconds": [0.0] * len(trained)}
    firsts = [next((point for point in cell["curve"] if point["accuracy"] >= target), None) for cell in trained]
    names = {"steps": "step", "seconds": "seconds"}
    return {key: [None if point is None else point[name] for point in firsts] for key, name in names.items()}


def _sanity(cells: Cells, arm: Arm, labels: str) -> dict[str, Any]:
    """What a sanity arm reached, and whether it is what an honest comparison must find.

    Of shuffled labels it is None, not known: one shuffle is no null, and this accuracy is none that every method
    optimises. The exercise tests them (`exercise.analysis.analyse_sanity`).
    """
    tested = cells.tested[JudgementKey(arm.name, 0, labels)]
    base = cells.base["accuracy"]
    found = tested["accuracy"]
    holds = found < base if labels == "swapped" else None
    return {
        "name": arm.name,
        "labels": labels,
        "accuracy": found,
        "base_accuracy": base,
        "holds": holds,
        **_intervals([tested]),
        "nll": tested["nll"],
    }

"""The chapter's claims against made-up figures."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_mlx.compare.chapter_claims import verdicts
from orpo_mlx.compare.claims import CONFIRMED, COPY, OPEN, REFUTED


def arm(
    name: str, *, peak: float = 1.0, steps: Any = (10, 10), seconds: Any = (5.0, 5.0), shares: Any = (0.9, 0.9)
) -> dict[str, Any]:
    def mean(value: float) -> dict[str, float]:
        return {"mean": value}

    grid = [{"accuracy": share} for share in shares]
    working = [share for share in shares if share is not None]
    return {
        "name": name,
        "needs_reference": "dpo" in name,
        "copies_reference": "copy" in name,
        "summary": {
            "reference_s": mean(2.0 if name == "dpo" else 0.0),
            "training_s": mean(10.0),
            "peak_memory_gib": mean(peak),
        },
        "to_target": {"steps": list(steps), "seconds": list(seconds)},
        "grid": grid,
        "sensitivity": max(working) - min(working) if len(working) == len(shares) and shares else None,
    }


def results(*arms: dict[str, Any], pairs: int = 1000) -> dict[str, Any]:
    return {
        "methods": list(arms),
        "seeds": 2,
        "target_accuracy": 0.9,
        "budget": {"words": "40 steps"},
        "settings": {"valid_pairs": -1},
        "data": {"pairs": {"valid": pairs}},
    }


def row(number: int, *arms: dict[str, Any], pairs: int = 1000) -> tuple[str, str]:
    found = verdicts(results(*arms, pairs=pairs))
    assert len(found) == 5
    return found[number].measured, found[number].verdict


def test_what_was_not_run_is_not_decided() -> None:
    for found in verdicts(results(arm("orpo"), arm("simpo"))):
        assert found.verdict == OPEN
        assert found.measured == "not measured: --methods has no dpo"


def test_reference_and_phases() -> None:
    measured, verdict = row(0, arm("orpo"), arm("dpo"))
    assert "2.0 s for DPO, 0.0 s for ORPO" in measured
    assert verdict == "confirmed for reference log-probs, refuted for a second model"
    assert "20% of its training time" in row(1, arm("orpo"), arm("dpo"))[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (1.0, 1.9, "depends on the trainer"),
        (1.0, 1.1, REFUTED),
        (1.95, 2.5, CONFIRMED),
        (1.0, None, f"{REFUTED} as run"),
    ],
)
def test_memory(ours: float, theirs: float | None, verdict: str) -> None:
    copies = [] if theirs is None else [arm(COPY, peak=theirs)]
    measured, found = row(2, arm("orpo"), arm("dpo", peak=ours), *copies)
    assert f"{ours:.2f} times ORPO's" in measured
    assert found.startswith(verdict)
    assert ("not measured" in measured) == (theirs is None)


@pytest.mark.parametrize(
    ("orpo", "dpo", "verdict"),
    [
        (((4, 5), (2.0, 3.0)), ((8, 9), (9.0, 9.5)), CONFIRMED),
        (((8, 9), (9.0, 9.5)), ((4, 5), (2.0, 3.0)), REFUTED),
        (((8, 9), (4.0, 4.5)), ((4, 5), (9.0, 9.5)), "depends on whether"),
        (((8, 8), (4.0, 4.5)), ((8, 8), (9.0, 9.5)), f"{CONFIRMED} in seconds alone"),
        # Seeds that overlap decide nothing, nor does a difference of a few hundredths.
        (((4, 9), (2.0, 9.0)), ((8, 9), (8.0, 9.5)), OPEN),
        (((100, 100), (50.0, 50.0)), ((104, 104), (52.0, 52.0)), OPEN),
        (((4, None), (2.0, None)), ((8, 9), (9.0, 9.5)), OPEN),
    ],
)
def test_convergence(orpo: Any, dpo: Any, verdict: str) -> None:
    arms = [arm(name, steps=steps, seconds=seconds) for name, (steps, seconds) in (("orpo", orpo), ("dpo", dpo))]
    assert row(3, *arms)[1].startswith(verdict)


@pytest.mark.parametrize(
    ("orpo", "dpo", "pairs", "verdict"),
    [
        ((0.9, 0.8), (0.9, 0.4), 1000, CONFIRMED),
        ((0.9, 0.4), (0.9, 0.8), 1000, REFUTED),
        # Among 32 pairs at 75 % such a difference is chance.
        ((0.9, 0.7), (0.9, 0.6), 32, OPEN),
        ((0.9, 0.8), (0.9, None), 32, CONFIRMED),
        ((), (), 32, OPEN),
    ],
)
def test_sensitivity(orpo: Any, dpo: Any, pairs: int, verdict: str) -> None:
    measured, found = row(4, arm("orpo", shares=orpo), arm("dpo", shares=dpo), pairs=pairs)
    assert found.startswith(verdict)
    assert ("not measured" in measured) == (not orpo)

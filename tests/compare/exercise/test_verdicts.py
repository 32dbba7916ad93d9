"""What is said of convergence and sensitivity, where it is plain which of two methods is ahead."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_mlx.compare.exercise.verdicts import CHAPTERS, convergence, sensitivity

BOUND = 1.0
STEPS = (0, 10, 20)


def method(golds: tuple[float, ...], kls: tuple[float, ...] = (0.0, 0.2, 0.4)) -> dict[str, Any]:
    """Three seeds, each a hair above the one before."""

    def curve(seed: int) -> list[dict[str, float]]:
        points = zip(STEPS, golds, kls, strict=False)
        return [{"step": step, "gold": gold + 1e-3 * seed, "kl": kl} for step, gold, kl in points]

    return {"chosen": {"rate": 1e-3}, "seeds": [{"curve": curve(seed)} for seed in range(3)]}


@pytest.mark.parametrize(
    ("ours", "dpo", "verdict"),
    [
        (method((0.0, 0.3, 0.6)), method((0.0, 0.2, 0.5)), "confirmed"),
        (method((0.0, 0.1, 0.6)), method((0.0, 0.2, 0.6)), "refuted"),
        (method((0.0, 0.3, 0.4)), method((0.0, 0.2, 0.5)), "depends on the budget: ORPO is ahead at 1 and behind at 1"),
        (method((0.0, 0.2, 0.5)), method((0.0, 0.2, 0.5)), "not decided: no look parts them"),
        # Far ahead, but where it is no longer near the base model.
        (method((0.0, 0.2, 9.0), (0.0, 0.2, 1.1)), method((0.0, 0.2, 0.5)), "not decided"),
        (method((0.0, 9.0, 9.0), (0.0, 2.0, 3.0)), method((0.0, 0.2, 0.5)), "not decided"),
        # One whose training ended early is compared as far as it came.
        (method((0.0, 0.3)), method((0.0, 0.2, 0.9)), "confirmed"),
    ],
)
def test_convergence(ours: dict[str, Any], dpo: dict[str, Any], verdict: str) -> None:
    assert convergence({"orpo": ours, "dpo": dpo}, BOUND).verdict.startswith(verdict)


def test_one_look_of_several_does_not_decide() -> None:
    looks = 8
    spread = (0.0, 0.1, 0.5)

    def seeds(first: float) -> dict[str, Any]:
        def curve(seed: int) -> list[dict[str, float]]:
            golds = [0.0, first + spread[seed], *[0.0] * (looks - 1)]
            return [{"step": step, "gold": gold, "kl": 0.0} for step, gold in enumerate(golds)]

        return {"chosen": {"rate": 1e-3}, "seeds": [{"curve": curve(seed)} for seed in range(3)]}

    dpo = {"chosen": {"rate": 1e-3}, "seeds": [{"curve": [dict.fromkeys(("step", "gold", "kl"), 0.0)] * 9}] * 3}
    # By itself it would: t of 2 degrees of freedom is 5.9, p 0.03, of eight looks 0.22.
    found = convergence({"orpo": seeds(0.7), "dpo": dpo}, BOUND)
    assert "step 1: +0.90 (+0.24 to +1.56)" in found.measured
    assert found.verdict.startswith("not decided")
    assert convergence({"orpo": seeds(20.0), "dpo": dpo}, BOUND).verdict == "confirmed"


def test_looks_beyond_the_bound_are_named_and_not_shown() -> None:
    variant = {"orpo": method((0.0, 0.3, 9.0), (0.0, 0.2, 1.1)), "dpo": method((0.0, 0.2, 0.5))}
    found = convergence(variant, BOUND)
    assert found.measured.endswith("3 seeds: step 10: +0.10 (+0.10 to +0.10)")
    assert "it is 0.20 nats for ORPO (rate 0.001) and 0.20 for DPO" in found.limit
    assert found.limit.endswith("beyond the KL bound of 1: step 20")
    variant["orpo"] = method((0.0, 0.3, 9.0), (0.0, 1.2, 1.1))
    found = convergence(variant, BOUND)
    assert found.measured.endswith("no look is within the KL bound")
    assert found.limit.endswith("step 10, step 20")


def tuned(golds: list[float]) -> dict[str, Any]:
    """A grid of as many settings, on four prompts that part them alike."""
    entries = [{"steps": 4, "score": gold, "valid_gold": [gold + 0.01 * row for row in range(4)]} for gold in golds]
    return {"tuning": entries, "seeds": [{"curve": [{"gold": 0.0}]}]}


@pytest.mark.parametrize(("name", "words"), [("orpo", "for ORPO"), (CHAPTERS, "for the chapter's loss")])
def test_sensitivity(name: str, words: str) -> None:
    flat, steep = tuned([0.5] * 11 + [0.6]), tuned([0.0] * 11 + [0.6])
    lost = sensitivity({"a": {name: flat, "dpo": steep}}, name)
    assert lost.verdict == "confirmed"
    # The best less the mean over twelve: 0.1 and 0.6, each times eleven twelfths.
    assert f"a: 0.09 of 0.60 {words}, 0.55 of 0.60 for DPO" in lost.measured
    assert (name in lost.claim) == (name != "orpo")
    assert sensitivity({"a": {name: steep, "dpo": flat}}, name).verdict == "refuted"
    both = {"a": {name: flat, "dpo": steep}, "b": {name: steep, "dpo": flat}}
    assert sensitivity(both, name).verdict.startswith("not decided")
    few = {"a": {name: tuned([0.5, 0.6]), "dpo": tuned([0.0, 0.6])}}
    assert sensitivity(few, name).verdict.startswith("confirmed on 2 settings; a grid of 12")

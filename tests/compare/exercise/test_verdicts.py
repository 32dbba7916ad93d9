"""What is said of convergence and sensitivity, where it is plain which of two methods is ahead."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_mlx.compare.exercise.contenders import SAME_LOSS
from orpo_mlx.compare.exercise.halving import Round
from orpo_mlx.compare.exercise.sizes import FULL_EXACT
from orpo_mlx.compare.exercise.study import size_record
from orpo_mlx.compare.exercise.verdicts import CHAPTERS, Verdict, convergence, phases, reference, sensitivity

SIZE = size_record(FULL_EXACT._replace(rounds=(Round(4, 40),)), 1.0)
STEPS = (0, 10, 20)
SEEDS = 4


def method(golds: tuple[float, ...], kls: tuple[float, ...] = (0.0, 0.2, 0.4)) -> dict[str, Any]:
    """Seeds that are a hair apart."""

    def curve(seed: int) -> list[dict[str, float]]:
        points = zip(STEPS, golds, kls, strict=False)
        return [{"step": step, "gold": gold + 1e-3 * seed**2, "kl": kl} for step, gold, kl in points]

    return {"chosen": {"rate": 1e-3}, "seeds": [{"curve": curve(seed)} for seed in range(SEEDS)]}


def tier(variants: dict[str, tuple[Any, Any]], at_kl: dict[str, float] | None = None) -> dict[str, Any]:
    """Variants with ORPO's and DPO's trainings, and ORPO's gold minus DPO's at KL 0.5 where it is known."""

    def analysed(labels: str) -> dict[str, Any]:
        gap = (at_kl or {}).get(labels)
        if gap is None:
            return {}
        figures = {"mean": gap, "low": gap - 0.01, "high": gap + 0.01, "p": 0.001 if gap else 1.0}
        return {"0.5": {"differences": {"orpo": {**figures, "standard_error": 0.005, "freedom": 9}}}}

    return {
        "size": SIZE,
        "variants": {labels: {"orpo": ours, "dpo": dpo} for labels, (ours, dpo) in variants.items()},
        "analysis": {"variants": {labels: {"at_kl": analysed(labels)} for labels in variants}},
    }


AHEAD = (method((0.0, 0.3, 0.6)), method((0.0, 0.2, 0.5)))
SAME = (method((0.0, 0.2, 0.5)), method((0.0, 0.2, 0.5)))


@pytest.mark.parametrize(
    ("variants", "verdict"),
    [
        ({"a": AHEAD}, "confirmed"),
        ({"a": (method((0.0, 0.1, 0.6)), method((0.0, 0.2, 0.6)))}, "refuted"),
        ({"a": AHEAD, "b": AHEAD[::-1]}, "not the same everywhere (ahead somewhere at a, behind somewhere at b)"),
        ({"a": (method((0.0, 0.3, 0.4)), AHEAD[1])}, "not the same everywhere (ahead somewhere at a, behind"),
        ({"a": AHEAD, "b": SAME}, "confirmed at a, elsewhere not decided"),
        ({"a": SAME}, "not decided"),
        # Far ahead, but where it is no longer near the base model.
        ({"a": (method((0.0, 0.2, 9.0), (0.0, 0.2, 1.1)), AHEAD[1])}, "not decided"),
        ({"a": (method((0.0, 9.0, 9.0), (0.0, 2.0, 3.0)), AHEAD[1])}, "not decided"),
        # One whose training ended early is compared as far as it came.
        ({"a": (method((0.0, 0.3)), method((0.0, 0.2, 0.9)))}, "confirmed"),
    ],
)
def test_convergence_by_steps(variants: dict[str, Any], verdict: str) -> None:
    assert convergence(tier(variants)).verdict.removeprefix("by steps ").startswith(verdict)


def test_more_reward_per_step_need_not_be_more_per_nat() -> None:
    found = convergence(tier({"a": AHEAD, "b": AHEAD}, {"a": -0.05, "b": -0.05}))
    assert found.verdict == "by steps confirmed; at equal KL refuted"
    assert "a: step 10 +0.10 (+0.10 to +0.10), step 20 +0.10 (+0.10 to +0.10), KL 0.5 -0.05 (-0.06 to" in found.measured
    assert convergence(tier({"a": AHEAD, "b": AHEAD}, {"a": 0.05, "b": 0.05})).verdict == "confirmed"
    assert convergence(tier({"a": AHEAD}, {"a": 0.0})).verdict.startswith("by steps confirmed; at equal KL not decided")


def test_what_two_tunings_of_one_loss_differ_by_does_not_count() -> None:
    """ORPO is 0.1 ahead by steps, and 0.05 behind at KL 0.5."""

    def judged(by_steps: float, at_kl: float) -> Verdict:
        given = tier({"a": AHEAD, "b": AHEAD}, {"a": -0.05, "b": -0.05})
        ours, theirs = SAME_LOSS
        # On one kind of labels alone: what tuning does is no more certain on the other.
        given["variants"]["b"] |= {ours: method((0.0, 0.5, 0.5)), theirs: method((0.0, 0.5 - by_steps, 0.5))}
        control = {"mean": at_kl, "low": at_kl - 0.01, "high": at_kl + 0.01}
        given["analysis"]["variants"]["b"]["at_kl"]["0.5"]["control"] = control
        return convergence(given)

    # ORPO's own interval at KL 0.5 is -0.06 to -0.04.
    assert judged(0.09, 0.029).verdict == "by steps confirmed; at equal KL refuted"
    assert judged(-0.11, 0.029).verdict == "by steps not decided; at equal KL refuted"
    assert judged(-0.11, 0.031).verdict == "not decided"
    # Of nine degrees of freedom: 0.005 (t(0.025) + t(0.2)) = 0.005 (2.262 + 0.883).
    assert "at equal KL 0.016 to 0.016 would be found" in (measured := judged(-0.11, -0.031).measured)
    assert "not beyond 0.041, as far as that of two tunings of one loss goes, does not count" in measured
    assert "no two tunings of one loss" in convergence(tier({"a": AHEAD})).measured


def test_a_look_at_which_one_seed_is_beyond_the_bound_is_left_out() -> None:
    ours, dpo = method((0.0, 0.3, 9.0)), method((0.0, 0.2, 0.5))
    ours["seeds"][2]["curve"][2]["kl"] = 1.01
    assert [figure["step"] for figure in convergence(tier({"a": (ours, dpo)})).figures] == [10]
    ours["seeds"][1]["curve"][1]["kl"] = 1.01
    found = convergence(tier({"a": (ours, dpo)}))
    assert found.figures == []
    assert "a: no look of all seeds is within the KL bound" in found.measured


def test_one_look_of_several_does_not_decide() -> None:
    spread = (0.0, 0.1, 0.5, 0.6)

    def seeds(first: float) -> dict[str, Any]:
        curves = [[(10, first * (1 + each)), (20, each), (30, -each), (40, 0.0)] for each in spread]
        return {
            "seeds": [{"curve": [{"step": step, "gold": gold, "kl": 0.0} for step, gold in each]} for each in curves]
        }

    dpo = {"seeds": [{"curve": [{"step": step, "gold": 0.0, "kl": 0.0} for step in (10, 20, 30, 40)]}] * 4}
    found = convergence(tier({"a": (seeds(0.3), dpo)}))
    first = found.figures[0]
    assert first["p"] < 0.05 / 3
    assert first["p_holm"] == pytest.approx(4 * first["p"])
    assert (first["p_holm"] < 0.05) == found.verdict.startswith("by steps confirmed")


def tuned(golds: list[float]) -> dict[str, Any]:
    """A grid of as many settings, half of them at either rate, on four prompts that part them alike."""
    entries = [
        {
            "rate": 1e-3 * (1 + (2 * place >= len(golds))),
            "steps": 4,
            "score": gold + 0.015,
            "valid_gold": [gold + 0.01 * row for row in range(4)],
        }
        for place, gold in enumerate(golds)
    ]
    return {"tuning": entries, "seeds": [{"curve": [{"gold": 0.015}]}]}


@pytest.mark.parametrize(("name", "words"), [("orpo", "for ORPO"), (CHAPTERS, "for the chapter's loss")])
def test_sensitivity(name: str, words: str) -> None:
    flat, steep = tuned([0.6, *[0.5] * 11]), tuned([0.6, *[0.0] * 11])
    lost = sensitivity({"a": {name: flat, "dpo": steep}}, name)
    assert lost.verdict == "confirmed"
    # The best less the mean of twelve, of what it gains: 0.1 and 0.6 of 0.6, times 11/12; of six, 5/6.
    assert f"a, all rates: 15% {words}, 92% for DPO" in lost.measured
    assert f"a, lower rates: 14% {words}, 83% for DPO" in lost.measured
    assert (name in lost.claim) == (name != "orpo")
    assert sensitivity({"a": {name: steep, "dpo": flat}}, name).verdict == "refuted"
    both = {"a": {name: flat, "dpo": steep}, "b": {name: steep, "dpo": flat}}
    assert sensitivity(both, name).verdict == "not decided"
    # Only high rates part them.
    high = {"a": {name: tuned([0.6] * 12), "dpo": tuned([*[0.6] * 6, *[0.0] * 6])}}
    assert sensitivity(high, name).verdict == "over all rates confirmed; over lower rates not decided"
    few = {"a": {name: tuned([0.6, 0.5, 0.5, 0.5]), "dpo": tuned([0.6, 0.0, 0.0, 0.0])}}
    assert (
        sensitivity(few, name).verdict
        == "confirmed, on 4 settings: a grid of 12 and more is needed to say so in general"
    )


def test_what_costs_say_is_measured() -> None:
    def cost(forward: int, peak: float) -> dict[str, Any]:
        orpo = {"peak_gib": 1.0, "forward_tokens": 0, "steps": 2}
        return {"measured": {"orpo": orpo, "dpo": {"peak_gib": peak, "forward_tokens": forward, "steps": 2}}}

    assert reference(cost(8, 1.0)).verdict == "confirmed for reference log-probs, refuted for a second model"
    assert reference(cost(0, 1.5)).verdict == "refuted for reference log-probs, confirmed for a second model"
    assert phases(cost(8, 1.0)).verdict.endswith("confirmed for a second forward pass")
    assert phases(cost(0, 1.0)).verdict.endswith("refuted for a second forward pass")

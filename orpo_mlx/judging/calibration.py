"""How far a judge can be trusted: whether it prefers the first answer, or the longer one, and agrees with a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orpo_mlx.data.prompts import Prompt, prompt_key, spread
from orpo_mlx.judging.contest import Judged, compare_replies, order_figures, question_of, share_figures
from orpo_mlx.judging.judges.rules import Rule
from orpo_mlx.judging.judges.verdicts import FIRST, SECOND, TIE, Judge
from orpo_mlx.judging.win_rate import mean_interval

PROMPTS = 20
"""How many prompts a judge is calibrated on."""
PADDING = (
    " This is a topic with a long and rich history, and there is much more that could be said about it. I hope this "
    "helps! If you have any further questions or need any more information, please don't hesitate to ask."
)
"""Adds length and nothing else: a judge that prefers a reply with it prefers length."""

# Below this, a judge says hardly more than a coin.
_LITTLE_AGREEMENT = 0.6


def calibrate(
    judge: Judge,
    judged: Judged,
    rule: Rule | None = None,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Figures about a judge, as JSON has them.

    `identical`: what it says of a reply beside itself, which should be a tie. `longer`: how often it prefers the
    candidate's reply with `PADDING` to the same without, in both orders. `order`: of its verdicts on the comparisons
    themselves, asked in both orders. `agreement`: with `rule`, where both decide.

    Args:
        judge: the judge.
        judged: the comparisons it has made.
        rule: something that is right by construction, to hold it against.
        progress: called with the number of questions answered.
    """
    found: dict[str, Any] = {"order": order_figures(judged)}
    chosen = spread(list(zip(judged.prompts, judged.questions, strict=True)), PROMPTS)
    prompts = [prompt for prompt, _ in chosen]
    replies = [question.second for _, question in chosen]
    # What scores each reply by itself cannot heed the order, and says of equal replies that they are equal.
    if not judge.fair:
        found["identical"] = identical_figures(judge, prompts, replies, progress)
    # Whether a rule prefers length is in its definition: nothing to find out.
    if not isinstance(judge, Rule):
        found["longer"] = longer_figures(judge, prompts, replies, lambda done: progress(len(chosen) + done))
    if rule is not None:
        found["agreement"] = agreement_figures(judged, rule)
    return found


def identical_figures(
    judge: Judge, prompts: Sequence[Prompt], replies: Sequence[str], progress: Callable[[int], None]
) -> dict[str, int]:
    """What a judge says of each reply beside itself, counted."""
    questions = [question_of(prompt, reply, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    verdicts = judge(questions, progress)
    counts = {winner: sum(verdict.winner == winner for verdict in verdicts) for winner in (FIRST, SECOND, TIE)}
    return {"asked": len(questions), **counts, "failures": sum(verdict.failure is not None for verdict in verdicts)}


def longer_figures(
    judge: Judge, prompts: Sequence[Prompt], replies: Sequence[str], progress: Callable[[int], None]
) -> dict[str, Any]:
    """How often a judge prefers a reply with padding to the same without."""
    judged = compare_replies(judge, prompts, replies, [reply + PADDING for reply in replies], progress)
    preferences = judged.preferences
    return {
        "asked": len(replies),
        "failures": len(replies) - len(preferences),
        "preferred": share_figures(mean_interval(preferences, judged.clusters) if preferences else None),
    }


def agreement_figures(judged: Judged, rule: Rule) -> dict[str, Any]:
    """How often a judge and a rule have the same winner, where both have one; κ (Cohen 1960) over all outcomes."""
    by_rule = rule([*judged.questions], lambda done: None)
    both = [
        (_winner(judged.ballots[number].preference), by_rule[number].winner, prompt_key(judged.prompts[number]))
        for number in judged.decided
    ]
    decided = [(float(ours == theirs), key) for ours, theirs, key in both if ours != TIE and theirs != TIE]
    share = mean_interval([same for same, _ in decided], [key for _, key in decided]) if decided else None
    return {
        "rule": rule.name,
        "compared": len(both),
        "both_decided": len(decided),
        "agreed": share_figures(share),
        "kappa": cohens_kappa([(ours, str(theirs)) for ours, theirs, _ in both]),
    }


def cohens_kappa(both: Sequence[tuple[str, str]]) -> float | None:
    """Agreement of two raters beyond chance: (p_o - p_e) / (1 - p_e); None where that is undefined."""
    if not both:
        return None
    count = len(both)
    observed = sum(ours == theirs for ours, theirs in both) / count
    by_chance = sum(
        sum(ours == name for ours, _ in both) * sum(theirs == name for _, theirs in both)
        for name in (FIRST, SECOND, TIE)
    ) / (count * count)
    # Both said one and the same thing throughout: agreement beyond chance is then 0/0.
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def _winner(preference: float) -> str:
    return TIE if preference == 0.5 else SECOND if preference > 0.5 else FIRST


def findings(figures: dict[str, Any]) -> list[str]:
    """What calibration has found against a judge, a sentence each."""
    found = []
    first = figures["order"]["first_preferred"]
    if first is not None and first["low"] > 0.5:
        found.append(f"The judge prefers the first answer: {_text(first)} of the verdicts that are no ties.")
    if first is not None and first["high"] < 0.5:
        found.append(f"The judge prefers the second answer: only {_text(first)} of its decisions are for the first.")
    same = figures.get("identical")
    if same is not None and same[FIRST] + same[SECOND] > same["asked"] / 2:
        found.append(
            f"Of {same['asked']} replies beside themselves the judge called {same[FIRST]} better as the first and "
            f"{same[SECOND]} as the second, where a tie is right."
        )
    longer = (figures.get("longer") or {}).get("preferred")
    if longer is not None and longer["low"] > 0.5:
        found.append(f"The judge prefers longer answers: {_text(longer)} for the same reply with empty words after it.")
    agreed = (figures.get("agreement") or {}).get("agreed")
    if agreed is not None:
        rule, count = figures["agreement"]["rule"], figures["agreement"]["both_decided"]
        said = f"The judge agrees with {rule} in {_text(agreed)} of the {count} that both decide:"
        if agreed["share"] < _LITTLE_AGREEMENT:
            found.append(f"{said} little more than chance.")
        elif agreed["low"] <= 0.5:
            found.append(f"{said} too few to tell from chance.")
    return found


def _text(share: dict[str, float]) -> str:
    return f"{share['share']:.0%} (95 % interval {share['low']:.0%} to {share['high']:.0%})"

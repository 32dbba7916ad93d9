"""The story of an evaluation: replies of two models, judged, in figures. `orpo-mlx evaluate` prints it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.data.prompts import Prompt
from orpo_mlx.files import write_text
from orpo_mlx.judging.calibration import PROMPTS, calibrate, findings
from orpo_mlx.judging.contest import Judged, by_category, check_judge, compare_replies, failures_text, figures
from orpo_mlx.judging.divergence import distinct_n
from orpo_mlx.judging.generation import Generated
from orpo_mlx.judging.judges.rules import Rule
from orpo_mlx.judging.judges.verdicts import Judge
from orpo_mlx.judging.requests import ROWS, Loading, Sampling, Side
from orpo_mlx.judging.sides import Replies, replies_of_both
from orpo_mlx.reporting.console import Reporter

# More failed judgements than these are said aloud beside the rate.
_WARN_FAILED = 0.1


class Plan(NamedTuple):
    """What is compared by whom."""

    baseline: Side
    candidate: Side
    judge: Judge
    check: Rule | None = None
    """A rule that a judge is held against."""
    sampling: Sampling = Sampling(128)
    loading: Loading = Loading()
    rows: int = ROWS
    baseline_replies: list[Generated] | None = None
    """What the baseline said to these prompts, where that is known; it is then not asked."""


class Evaluation(NamedTuple):
    """An evaluation at its end."""

    figures: dict[str, Any]
    judged: Judged
    replies: Replies


def evaluate(plan: Plan, prompts: Sequence[Prompt], reporter: Reporter) -> Evaluation:
    """Draw replies of both sides, let the judge compare them, and sum up.

    Raises:
        UserError: a model or the judge cannot be used, or a prompt cannot be given to them.
    """
    check_judge(plan.judge, prompts)
    if plan.check is not None:
        check_judge(plan.check, prompts, "check_judge")
    with reporter.bar("replies", 2 * len(prompts), "replies") as advance:
        replies = replies_of_both(
            plan.baseline,
            plan.candidate,
            prompts,
            plan.sampling,
            loading=plan.loading,
            rows=plan.rows,
            progress=advance,
            known=plan.baseline_replies,
        )
    with reporter.bar("judgements", 2 * len(prompts), "judgements") as advance:
        judged = compare_replies(plan.judge, prompts, texts(replies.baseline), texts(replies.candidate), advance)
    # Of each prompt one question about equal replies, and two, one in each order, about the padded one.
    with reporter.bar("calibration", 3 * PROMPTS, "questions") as advance:
        trust = calibrate(plan.judge, judged, plan.check, progress=advance)
    found = {
        "judge": plan.judge.name,
        "baseline": side_figures(plan.baseline, replies.baseline),
        "candidate": side_figures(plan.candidate, replies.candidate),
        "sampling": plan.sampling._asdict(),
        **figures(judged),
        "categories": by_category(judged),
        "kl": None if replies.divergence is None else replies.divergence._asdict(),
        "trust": trust,
        "findings": findings(trust),
    }
    return Evaluation(found, judged, replies)


def texts(replies: Sequence[Generated]) -> list[str]:
    """What was said."""
    return [reply.text for reply in replies]


def side_figures(side: Side, replies: Sequence[Generated]) -> dict[str, Any]:
    """A side and what its replies are like: lengths, how many ended by themselves, distinct-1 and distinct-2."""
    said = texts(replies)
    return {
        "model": side.model,
        "adapter": None if side.adapter is None else str(side.adapter),
        "mean_tokens": statistics.fmean(len(reply.ids) for reply in replies),
        "mean_characters": statistics.fmean(map(len, said)),
        "finished": statistics.fmean(reply.finished for reply in replies),
        "distinct_1": distinct_n(said, 1),
        "distinct_2": distinct_n(said, 2),
    }


def write_replies(path: Path, judged: Judged) -> None:
    """Write every comparison as a line of JSON: prompt, both replies, verdicts and what came of them."""
    rows = []
    for prompt, question, ballot in zip(*judged, strict=True):
        rows.append(
            {
                "location": prompt.location,
                "prompt": question.prompt,
                "baseline": question.first,
                "candidate": question.second,
                "baseline_first": ballot.baseline_first.winner,
                "candidate_first": ballot.candidate_first.winner,
                "preference": None if ballot.failure else ballot.preference,
                "failure": ballot.failure,
            }
        )
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def as_text(found: dict[str, Any]) -> str:
    """The figures in a few lines."""
    lines = [
        f"{found['judged']} of {found['prompts']} prompts judged by {found['judge']}: {found['wins']} wins, "
        f"{found['losses']} losses, {found['ties']} ties ({found['identical_replies']} with equal replies)"
    ]
    if found["win_rate"] is None:
        lines.append("no win rate: too many judgements failed")
    else:
        lines.append(f"win rate {_rate(found['win_rate'], found['interval'])}")
        controlled = _rate(found["win_rate_length_controlled"], found["interval_length_controlled"])
        lines.append(f"win rate at equal length {controlled}")
    if found["judge_failures"]:
        low, high = found["win_rate_bounds"]
        lines.append(
            f"{found['judge_failures']} judgements failed ({failures_text(found['failure_reasons'])}); with them the "
            f"win rate would lie between {low:.1%} and {high:.1%}"
        )
    for name in ("baseline", "candidate"):
        side = found[name]
        lines.append(
            f"{name}: {side['mean_tokens']:.1f} tokens, {side['mean_characters']:.0f} characters a reply, "
            f"distinct-2 {_number(side['distinct_2'])}"
        )
    if found["kl"] is not None:
        lines.append(f"KL to the baseline {found['kl']['per_reply']:.2f} nats a reply")
    agreed = found["trust"].get("agreement")
    if agreed is not None and agreed["agreed"] is not None:
        share = agreed["agreed"]
        lines.append(
            f"the judge agrees with {agreed['rule']} in {_rate(share['share'], [share['low'], share['high']])} of "
            f"{agreed['both_decided']} comparisons that both decide; kappa {_number(agreed['kappa'])}"
        )
    return "\n".join([*lines, *found["findings"]]) + "\n"


def failure_warning(found: dict[str, Any]) -> str | None:
    """What is to be said where many judgements failed."""
    if found["judge_failures"] <= _WARN_FAILED * found["prompts"]:
        return None
    return (
        f"{found['judge_failures']} of {found['prompts']} judgements failed: {failures_text(found['failure_reasons'])}"
    )


def _rate(mean: float, interval: Sequence[float]) -> str:
    return f"{mean:.1%} (95 % interval {interval[0]:.1%} to {interval[1]:.1%})"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"

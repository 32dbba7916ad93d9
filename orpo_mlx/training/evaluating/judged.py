"""Replies of a run's model against its base's, judged in the middle of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

from orpo_mlx.data.prompts import Prompt, plain_text, spread
from orpo_mlx.errors import ConfigError
from orpo_mlx.judging.contest import check_judge, compare_replies, figures
from orpo_mlx.judging.generation import Generated
from orpo_mlx.judging.judges.judges import JudgeOptions, make_judge
from orpo_mlx.judging.requests import Sampling
from orpo_mlx.judging.sides import draw
from orpo_mlx.models.adapters import adapters_off
from orpo_mlx.training.run import Run
from orpo_mlx.types import Group, Pair

# Prompts are spread over this many rows of a split, so that a large one need not be read to its end.
_ROWS_LOOKED_AT = 1000
_FIGURES = ("win_rate", "win_rate_length_controlled", "judge_failures", "ties")


class JudgedReplies:
    """Greedy replies to held-out prompts, with the adapters on, against those of the base, with the adapters off.

    Args:
        run: with LoRA or DoRA adapters.
        prompts: what is asked.

    Raises:
        UserError: the judge is none, or could not judge these prompts.
    """

    def __init__(self, run: Run, prompts: Sequence[Prompt]) -> None:
        config = run.config
        self._run = run
        self._prompts = prompts
        self._sampling = Sampling(config.sample_tokens, seed=config.seed, template_strings=config.template_strings)
        options = JudgeOptions(
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            template_strings=config.template_strings,
        )
        self._judge = make_judge(str(config.judge), options)
        check_judge(self._judge, prompts)
        self._base: list[Generated] | None = None

    def __call__(self) -> dict[str, float]:
        """Win rate, the same with length controlled, failed judgements, ties and mean length, as metrics are written;
        rates are NaN where too many judgements failed. The model keeps its mode."""
        if self._base is None:
            # Greedy replies of weights that are never trained: the same at every step.
            self._base = self._draw(base=True)
        replies = self._draw(base=False)
        base, tuned = ([reply.text for reply in side] for side in (self._base, replies))
        found = figures(compare_replies(self._judge, self._prompts, base, tuned))
        tokens = sum(len(reply.ids) for reply in replies) / len(replies)
        return {**{name: _number(found[name]) for name in _FIGURES}, "reply_tokens": tokens}

    def _draw(self, *, base: bool) -> list[Generated]:
        loaded = self._run.loaded
        state = partial(adapters_off, loaded.model) if base else nullcontext
        return draw(loaded, self._prompts, self._sampling, state=state)


def judged_replies(run: Run) -> JudgedReplies | None:
    """What judges this run's replies; None where that was not asked for, or another process does.

    Raises:
        ConfigError: the base cannot be asked, or there is no text to ask.
    """
    config = run.config
    if config.evaluate_every is None or not run.ranks.first:
        return None
    split = next(run.splits[name] for name in ("valid", "test", "train") if name in run.splits)
    rows = [row for row in itertools.islice(split.raw(), _ROWS_LOOKED_AT) if not row.whole_text]
    if not rows or run.loaded.tokenizer is None:
        raise ConfigError(
            "`evaluate_every`: the rows are token ids, or texts without prompts, so that there is nothing to ask; "
            "leave it out."
        )
    return JudgedReplies(run, [as_prompt(row) for row in spread(rows, config.judge_prompts)])


def as_prompt(row: Pair | Group) -> Prompt:
    """A row's prompt; the chosen side is the right answer, where there is one."""
    if isinstance(row, Pair):
        return Prompt(row, plain_text(row.chosen), None)
    pair = Pair(row.prompt, "-", "-", row.location, row.tools, row.template_kwargs)
    return Prompt(pair, None, None)


def judged_line(step: int, found: dict[str, float]) -> str:
    """What the terminal shows."""
    rate = found["win_rate"]
    said = "no win rate, too many judgements failed" if math.isnan(rate) else f"win rate {rate:.1%}"
    failed = f", {found['judge_failures']:.0f} judgements failed" if found["judge_failures"] else ""
    return f"step {step}: {said} over the base, {found['reply_tokens']:.1f} tokens a reply{failed}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

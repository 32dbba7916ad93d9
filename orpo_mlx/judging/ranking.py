"""From scored samples of a prompt to rows that `train` reads, with a count of everything that is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.prompts import Prompt
from orpo_mlx.types import Text

FORMS = ("pairs", "groups")
"""What becomes of a prompt's samples: its best and its worst, or all of them with their scores."""

LEFT_OUT = {
    "duplicates": "samples that repeat another of their prompt",
    "empty": "samples without text",
    "unjudged": "samples whose judgement failed",
    "unfinished": "samples that were cut off at `max_tokens`, which are no good example",
    "no_contrast": "prompts with fewer than two different samples",
    "near_ties": "prompts whose best and worst are too close",
    "none_finished": "prompts whose samples were all cut off",
}
"""What is counted, by its key in JSON."""


class Sample(NamedTuple):
    """One reply that was drawn."""

    text: str
    finished: bool
    """Whether it ended by itself."""
    number: int = 0
    """Its place among the samples of its prompt."""


class Scored(NamedTuple):
    """A sample and what a judge makes of it."""

    sample: Sample
    score: float
    """The higher the better."""


def different(samples: Sequence[Sample], counts: Counter[str]) -> list[Sample]:
    """Samples with text, each text once; the others are counted. Of equal ones, one that ended by itself is kept."""
    kept: dict[str, Sample] = {}
    for sample in samples:
        if not sample.text:
            counts["empty"] += 1
            continue
        known = kept.get(sample.text)
        if known is not None:
            counts["duplicates"] += 1
        if known is None or (sample.finished and not known.finished):
            kept[sample.text] = sample
    return list(kept.values())


def make_rows(
    prompt: Prompt,
    scored: Sequence[Scored],
    form: str,
    min_gap: float,
    provenance: Mapping[str, Any],
    counts: Counter[str],
) -> list[dict[str, Any]]:
    """The rows that a prompt's scored samples give, one or none; what is left out is counted.

    Args:
        prompt: what they answer.
        scored: different samples with their scores.
        form: one of `FORMS`.
        min_gap: the least score of the best above the worst.
        provenance: put into the row, beside the numbers of its samples.
        counts: receives keys of `LEFT_OUT`.
    """
    ended = [each for each in scored if each.sample.finished]
    if len(scored) < 2:
        counts["no_contrast"] += 1
        return []
    if not ended:
        counts["none_finished"] += 1
        return []
    # A reply that was cut off would be trained on with an end that it does not have: it can be what is avoided, and
    # never what is learnt.
    usable = ended if form == "groups" else list(scored)
    if len(ended) < len(scored):
        counts["unfinished"] += len(scored) - len(ended)
    best = max(ended, key=lambda each: each.score)
    worst = min(usable, key=lambda each: each.score)
    # Both tests: with a `min_gap` of 0 equal scores would pass the second.
    if best.score <= worst.score or best.score - worst.score < min_gap:
        counts["near_ties"] += 1
        return []
    if form == "groups":
        ranked = sorted(usable, key=lambda each: -each.score)
        numbers = [each.sample.number for each in ranked]
        return [
            {
                **prompt_columns(prompt),
                "completions": [completion(prompt, each.sample.text) for each in ranked],
                "scores": [each.score for each in ranked],
                "provenance": {**provenance, "samples": numbers},
            }
        ]
    return [
        {
            **prompt_columns(prompt),
            "chosen": completion(prompt, best.sample.text),
            "rejected": completion(prompt, worst.sample.text),
            "score_chosen": best.score,
            "score_rejected": worst.score,
            "provenance": {**provenance, "samples": [best.sample.number, worst.sample.number]},
        }
    ]


def prompt_columns(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a row has it."""
    pair = prompt.pair
    columns: dict[str, Any] = {"prompt": plain(pair.prompt)}
    if pair.tools:
        columns["tools"] = [dict(tool) for tool in pair.tools]
    if pair.template_kwargs:
        columns["chat_template_kwargs"] = dict(pair.template_kwargs)
    return columns


def completion(prompt: Prompt, text: str) -> Any:
    """A reply as a row has it: in turns where the prompt is."""
    return text if isinstance(prompt.pair.prompt, str) else [{"role": "assistant", "content": text}]


def plain(text: Text) -> Any:
    """A prompt as JSON has it."""
    return text if isinstance(text, str) else [dict(turn) for turn in text]


def summary(counts: Mapping[str, int]) -> str:
    """What was left out, in a clause; empty where nothing was."""
    return "; ".join(f"{counts[name]} {text}" for name, text in LEFT_OUT.items() if counts.get(name))

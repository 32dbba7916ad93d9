"""Rows of data sets that are not pairs of texts: said to be what they are, since no setting turns them into pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from orpo_mlx.errors import DataError

# Columns of vision-language and speech data. The text beside them speaks of what a text model cannot see.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class OtherRowsError(DataError):
    """A row of a kind that every row of its data set is of: leaving out rows is no remedy."""


class Kind(NamedTuple):
    """A kind of data set that holds no pairs."""

    columns: tuple[str, ...]
    """That tell it, the first kind whose columns are all there."""
    text: str


_NEEDED = (
    "expected two answers to each prompt, chosen and rejected (`columns=chosen=NAME` where they are called otherwise)"
    "; `method=sft` learns from single answers and texts"
)

_KINDS = (
    Kind(("prompt", "completion"), "the row is one answer to imitate (prompt and completion, as for fine-tuning)"),
    Kind(("instruction", "output"), "the row is one answer to imitate (Alpaca's instruction and output)"),
    Kind(("messages",), "the row is one conversation to imitate (messages, as for fine-tuning)"),
    Kind(("conversations",), "the row is one conversation to imitate (ShareGPT, as for fine-tuning)"),
    Kind(("question", "answer"), "the row is one answer to imitate (question and answer)"),
    Kind(("text",), "the row is one text (as for pretraining)"),
)


def refuse_other_rows(row: Mapping[str, Any], location: str) -> None:
    """Raise `OtherRowsError` where a row without sides is of a known kind."""
    # One side alone is a column with another name, or lost.
    if "chosen" in row or "rejected" in row:
        return
    for kind in _KINDS:
        if all(name in row for name in kind.columns):
            answers = row[kind.columns[-1]]
            if isinstance(answers, list) and len(answers) > 1 and not isinstance(answers[0], dict):
                raise OtherRowsError(
                    f"{location}: {kind.columns[-1]!r} is a list of {len(answers)}, and nothing says which of them is "
                    "better; expected chosen and rejected, or scores beside a list of completions."
                )
            raise OtherRowsError(f"{location}: {kind.text}; {_NEEDED}.")


def refuse_media(row: Mapping[str, Any], location: str) -> None:
    """Raise `OtherRowsError` where a row holds pictures or sound: trained without them, its text would be made up."""
    for name in _MEDIA:
        # Not merely there: a table gives the column to rows without pictures as well, as null or empty.
        if row.get(name):
            raise OtherRowsError(f"{location}: the row has {name!r}; only text can be trained on here.")

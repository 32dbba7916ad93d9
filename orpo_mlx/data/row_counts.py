"""What became of the rows of a split: counted, so that none is lost quietly."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from orpo_mlx.errors import DataError

REASONS = {
    "bad_row": "not a usable row",
    "empty_prompt": "the prompt is empty",
    "empty_side": "a side is empty",
    "equal_sides": "chosen and rejected are the same tokens",
    "low_margin": "chosen scores less than `min_margin` above rejected",
    "equal_ratings": "no two completions with different ratings",
    "too_long": "longer than",
    "no_completion_left": "no completion token left",
}
"""Why a row can be left out, by its key in JSON."""

# What token stores have for the setting that limits a row; messages mention it as they mention every setting.
MAX_SEQ_LENGTH = "--max-seq-length"

# Locations kept of each reason and note, for a report's line.
_MOST_LOCATIONS = 10
# Lines of `left_out.txt`. A data set of which every row is bad would fill memory and disk with them.
_MOST_LISTED = 10_000


@dataclasses.dataclass
class RowReport:
    """Counts over one split, and where the first of each kind stand."""

    limit: str = ""
    """The setting and length that `too_long` is about, as text."""
    rows_read: int = 0
    rows_kept: int = 0
    """Rows that gave at least one pair."""
    pairs_left_out: int = 0
    """Pairs left out of rows that gave others, where a row holds several."""
    shapes: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows left out, by a key of `REASONS`."""
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows that were taken, with something to know about how."""
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The locations of the first ten of each reason and note."""
    left_out: list[str] = dataclasses.field(default_factory=list)
    """A line for each row left out, up to 10,000."""

    def drop(self, reason: str, location: str, error: DataError | None = None) -> None:
        """Count a row that is left out."""
        self.dropped[reason] += 1
        self._remember(reason, location)
        if len(self.left_out) < _MOST_LISTED:
            self.left_out.append(str(error) if error else f"{location}: {self.text_of(reason)}.")

    def note(self, text: str, location: str) -> None:
        """Count a row that is taken in a way worth knowing."""
        self.notes[text] += 1
        self._remember(text, location)

    def text_of(self, reason: str) -> str:
        """A reason as text, with the length where it is about one."""
        if reason != "too_long":
            return REASONS[reason]
        return f"{REASONS[reason]} {self.limit.replace(MAX_SEQ_LENGTH, '`max_seq_length`')}"

    def summary(self) -> str:
        """What was left out and noted, for one line of a report; empty where there is nothing to say."""
        left_out = [f"{count} left out: {self.text_of(reason)}" for reason, count in self.dropped.items()]
        noted = [f"{count} {note}" for note, count in self.notes.items()]
        return "".join(f", {part}" for part in left_out + noted)

    @property
    def shape(self) -> str:
        """The name of the rows' shape; several are joined with "+"."""
        return " + ".join(self.shapes)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        # Under the fields' own names, which old token stores have: renaming one needs a translation here.
        return dict(vars(self))

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> RowReport:
        """The report `to_json` wrote."""
        # JSON gives back plain tables, in which the first row of a new reason would be a KeyError.
        counters = {name: Counter(table[name]) for name in ("shapes", "dropped", "notes")}
        return cls(**{**table, **counters})

    def _remember(self, key: str, location: str) -> None:
        places = self.places.setdefault(key, [])
        if len(places) < _MOST_LOCATIONS:
            places.append(location)

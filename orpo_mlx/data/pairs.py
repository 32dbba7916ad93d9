"""From a source of rows to `Pair`s and `Group`s. Every complaint carries `file:line`; every row left out is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from orpo_mlx.data.groups import COMPLETIONS_LEFT_OUT, pair_count, usable_group
from orpo_mlx.data.readers import Row
from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.shapes.columns import COLUMNS
from orpo_mlx.data.shapes.formats import ReadRow, read_row
from orpo_mlx.data.shapes.messages import is_empty
from orpo_mlx.data.shapes.other_rows import OtherRowsError
from orpo_mlx.data.shapes.row_parts import RowData
from orpo_mlx.data.sources import FileSource, Source
from orpo_mlx.data.tokens.trained_turns import TRAINED_TURNS
from orpo_mlx.errors import ConfigError, DataError, did_you_mean
from orpo_mlx.types import Group, Pair, TokenizedGroup, TokenizedPair

WEIGHTED = "whose loss is multiplied by their weight column"
SCORED_WRONGLY = "whose scores put the rejected side first"
NULLS_LEFT_OUT = (
    "without nulls inside tools or tool calls, which this kind of file also has for keys that only other rows have"
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read."""

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Column names by the names this package knows, such as {"prompt": "question"}."""
    pair_ratings: str | None = None
    """How a row of rated completions becomes pairs, one of `ratings.PAIRINGS`."""
    min_margin: float | None = None
    """Leave out pairs whose chosen side scores less than this above the rejected one."""
    labels: tuple[str, ...] = ()
    """A data set's words for a good and for a bad completion."""
    one_sided: bool = False
    """Whether the method looks at chosen completions alone, so that rows of one completion are something to learn."""
    skip_bad_rows: bool = False
    """Leave out and count rows that cannot be used, instead of stopping at the first."""
    template_strings: bool = True
    """Put strings into the chat template; see `PairRenderer`."""
    train_on: str = TRAINED_TURNS[0]
    """What is learned of completions of several turns, one of `TRAINED_TURNS`."""


class PairsOfRow(NamedTuple):
    """The pairs one row gave, at least one, or its group."""

    location: str
    pairs: list[RowData]
    notes: tuple[str, ...] = ()
    """What to know about how the row was taken; counted once it is known to be kept. So is the next."""
    pairs_left_out: int = 0


def read_pairs(source: Source, reading: Reading, report: RowReport) -> Iterator[PairsOfRow]:
    """The pairs, or the group, of every row, in order; what is left out goes into `report`.

    Raises:
        DataError: the file cannot be read, has no row, or (without `skip_bad_rows`) a row cannot be used.
    """
    for row in source.rows():
        report.rows_read += 1
        try:
            read = _read_pairs_of(row, reading)
            reason, pairs = usable_pairs(read.pairs, reading.min_margin)
        except DataError as error:
            if not reading.skip_bad_rows:
                raise with_remedy(error) from None
            report.drop("bad_row", row.location, error)
            continue
        report.shapes[read.shape] += 1
        if not pairs:
            report.drop(reason, row.location)
            continue
        left_out = sum(map(pair_count, read.pairs)) - sum(map(pair_count, pairs))
        yield PairsOfRow(row.location, pairs, tuple(_notes_on(row, read, pairs)), left_out)
    if not report.rows_read:
        raise_no_rows(source.name)


def _notes_on(row: Row, read: ReadRow, pairs: list[RowData]) -> Iterator[str]:
    """What to know about how the row was taken, of which these pairs are used."""
    if len(pairs) == 1 and len(pairs[0].completions) < max(len(pair.completions) for pair in read.pairs):
        yield COMPLETIONS_LEFT_OUT
    yield from read.notes
    if row.nulls_left_out:
        yield NULLS_LEFT_OUT
    if any((pair.margin or 0) < 0 for pair in pairs):
        yield SCORED_WRONGLY
    if any(pair.weight != 1 for pair in pairs):
        yield WEIGHTED


def load_pairs(path: str | Path, reading: Reading | None = None) -> list[RowData]:
    """All pairs and groups of a file, in order; a row without one is an error.

    Raises:
        DataError: the file or a row cannot be used.
    """
    reading = reading or Reading()
    report = RowReport()
    pairs: list[RowData] = []
    for row in FileSource([Path(path)]).rows():
        reason, usable = usable_pairs(_read_pairs_of(row, reading).pairs, reading.min_margin)
        if not usable:
            raise DataError(f"{row.location}: {report.text_of(reason)}.")
        pairs += usable
    return pairs or raise_no_rows(str(path))


def parse_columns(text: str | None) -> dict[str, str]:
    """`prompt=question,rejected=worse` as a mapping.

    Raises:
        ConfigError: it is not a list of NAME=COLUMN.
    """
    columns: dict[str, str] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and equals and column) or name in columns:
            raise ConfigError(f"`columns`: found {part!r}, expected NAME=COLUMN once for each name, joined by commas.")
        if name not in COLUMNS:
            hint = did_you_mean(name, COLUMNS, f"; expected one of {', '.join(COLUMNS)}.")
            raise ConfigError(f"`columns`: {name!r} is not a name that rows are read by{hint}")
        columns[name] = column
    return columns


def _read_pairs_of(row: Row, reading: Reading) -> ReadRow:
    """What a row is taken for."""
    if isinstance(row.value, DataError):
        raise row.value
    return read_row(
        renamed(row, reading.columns),
        row.location,
        pair_ratings=reading.pair_ratings,
        labels=reading.labels,
        one_sided=reading.one_sided,
    )


def renamed(row: Row, columns: Mapping[str, str]) -> Any:
    """The row's values under this package's column names.

    Raises:
        DataError: it lacks one of the columns.
    """
    if not columns or not isinstance(row.value, dict):
        return row.value
    for name, column in columns.items():
        if column not in row.value:
            found = ", ".join(sorted(map(str, row.value))[:8]) or "no columns"
            raise DataError(f"{row.location}: `columns={name}={column}`: no such column, found {found}.")
    # A column that gives its name to another is out of the way, whatever it held: with prompt=question, a `prompt`
    # column must not be what is trained on.
    taken = set(columns) | set(columns.values())
    rest = {name: value for name, value in row.value.items() if name not in taken}
    return {**rest, **{name: row.value[column] for name, column in columns.items()}}


def parse_labels(text: str | None) -> tuple[str, ...]:
    """`good,bad` as a data set's two words; none where there is no text.

    Raises:
        ConfigError: it is not two words.
    """
    words = tuple(part.strip() for part in (text or "").split(",")) if text is not None else ()
    if words and (len(words) != 2 or not all(words) or words[0].lower() == words[1].lower()):
        raise ConfigError(f"`labels`: found {text!r}, expected the words for good and for bad, such as good,bad.")
    return words


def usable_pairs(pairs: list[RowData], min_margin: float | None) -> tuple[str, list[RowData]]:
    """The pairs that can be used, or what can be of a group, and why the first that cannot be is left out."""
    usable: list[RowData] = []
    reasons = []
    for pair in pairs:
        found: RowData | None = pair
        if isinstance(pair, Group | TokenizedGroup):
            found, reason = usable_group(pair, min_margin)
        else:
            reason = _reason_unusable(pair, min_margin)
            found = None if reason else pair
        usable += [] if found is None else [found]
        reasons.append(reason)
    # No reason and nothing usable: only rows of equal ratings give no pair to begin with.
    return next(filter(None, reasons), "equal_ratings"), usable


def _reason_unusable(pair: Pair | TokenizedPair, min_margin: float | None) -> str | None:
    """Why a pair is left out, a key of `row_counts.REASONS`; None where it is not."""
    if min_margin is not None:
        margin = pair.margin
        if margin is None:
            raise DataError(
                f"{pair.location}: `min_margin={min_margin:g}` needs scores such as score_chosen and score_rejected; "
                "the row does not have both."
            )
        if margin < min_margin:
            return "low_margin"
    if isinstance(pair, TokenizedPair):
        if not pair.prompt_ids:
            return "empty_prompt"
        return None if pair.chosen_ids and pair.rejected_ids else "empty_side"
    if is_empty(pair.prompt):
        return "empty_prompt"
    return "empty_side" if is_empty(pair.chosen) or is_empty(pair.rejected) else None


def with_remedy(error: DataError) -> DataError:
    """The error of a row that stops a run, with the way to go on without it where there is one."""
    if isinstance(error, OtherRowsError):
        return error
    return DataError(f"{str(error).rstrip('.')}; `skip_bad_rows` leaves such rows out and lists them.")


def raise_no_rows(name: str) -> NoReturn:
    """The error of a file without rows, which reads as nothing to do and is a wrong path more often than not."""
    raise DataError(f"{name}:1: the file has no rows; expected at least one.")

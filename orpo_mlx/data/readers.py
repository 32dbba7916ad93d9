"""Rows of one data file, one after another, each with its location. A broken row is yielded as its error."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from orpo_mlx.data.arrow_values import rows_of
from orpo_mlx.errors import DataError, reason_of
from orpo_mlx.files import check_regular

# Characters of a JSON list read at a time: what is in memory at once, whatever the file's size.
_BLOCK = 1 << 20
# Characters in which an object that wraps its rows has to come to them.
_START = 1 << 16
# Rows of a Parquet or Arrow file made Python objects at a time; row groups can hold a million.
_BATCH_ROWS = 512
_SEPARATORS = {",": "commas", "\t": "tabs"}
# What stands between the items of a JSON list.
_BETWEEN = re.compile(r"[\s,]*")
# An object whose rows are under one of these names, behind entries that are no tables themselves.
_WRAPPED = re.compile(
    r'\s*\{(?:\s*"[^"]{0,99}"\s*:\s*(?:"[^"]{0,9999}"|[^"\[{\s]{1,99})\s*,){0,20}\s*"(?:data|rows|examples)"\s*:\s*\['
)
# How files begin that often bear another's name, and what to do about it.
_MISNAMED = {
    b"\x1f\x8b": "compressed with gzip; run gunzip on it, or let its name end in .gz",
    b"PAR1": "a Parquet file; name it .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
}


class Row(NamedTuple):
    """A row as it stands in its file."""

    location: str
    """`file:line`; for Parquet, Arrow and the Hub the row's number from 1."""
    value: Any | DataError
    """What was read, or why it cannot be."""
    nulls_left_out: bool = False
    """Whether nulls inside tools or tool calls were taken for keys that Arrow filled in."""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file, read as they are asked for.

    Raises:
        DataError: the file as a whole cannot be read: it is missing, of another kind, compressed, or breaks off.
    """
    reader = READERS.get(file_kind(path))
    if reader is None:
        raise DataError(f"{path}: files of this kind are not read, expected {', '.join(READERS)}.")
    try:
        check_regular(path)
        _check_content(path)
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise DataError(f"{path}: cannot be read ({reason}).") from None


def file_kind(path: Path) -> str:
    """How a file's name ends, a key of `READERS` where it can be read: `.jsonl`, `.jsonl.gz`."""
    return "".join(path.suffixes[-2 if path.suffix.lower() == ".gz" else -1 :]).lower()


def file_stem(path: Path) -> str:
    """A file's name without that ending."""
    return path.name[: len(path.name) - len(file_kind(path))]


def _opened(path: Path) -> BinaryIO:
    """A file's bytes, decompressed where its name says so."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _opened_text(path: Path, newline: str | None = None) -> TextIO:
    """Its text."""
    # "-sig" takes off the byte order mark that some editors on Windows write.
    return TextIOWrapper(_opened(path), encoding="utf-8-sig", newline=newline)


def _check_content(path: Path) -> None:
    """Refuse a file whose first bytes are those of another kind of file than its name says."""
    with _opened(path) as file:
        start = file.read(4)
    for mark, remedy in _MISNAMED.items():
        if start.startswith(mark) and not (mark == b"PAR1" and path.suffix.lower() == ".parquet"):
            raise DataError(f"{path}:1: the file is {remedy}.")


def jsonl_rows(path: Path) -> Iterator[Row]:
    """A row a line; blank lines are skipped."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            # A byte order mark, which some editors on Windows write, is not JSON.
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                location = f"{path}:{number}"
                yield Row(location, value_or_error(_json_line, text, location))


def _json_line(text: bytes, location: str) -> Any:
    """The value of one line."""
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise not_utf8(location) from None
    except (ValueError, RecursionError) as error:
        if text.strip() == b"[":
            raise DataError(
                f"{location}: found a JSON list, expected one JSON object per line; name it .json."
            ) from None
        reason = json_reason(error)
        raise DataError(f"{location}: invalid JSON ({reason}); expected one JSON object per line.") from None


def json_rows(path: Path) -> Iterator[Row]:
    """A list of rows, alone or as the `data` of an object, read a block at a time; a `.json` file that begins with
    another object is taken for JSON lines."""
    with _opened_text(path) as file:
        try:
            start = file.read(_START)
            while not start.strip() and (more := file.read(_START)):
                start += more
        except UnicodeDecodeError:
            raise not_utf8(f"{path}:1") from None
        first = start.lstrip()[:1]
        if first not in ("[", "{", ""):
            raise DataError(f"{path}:1: found text that begins with {first!r}, expected a JSON list of rows.")
        wrapped = None if _is_json_lines(start) else _WRAPPED.match(start)
        if first == "[" or wrapped:
            yield from list_items(file, path, start, wrapped.end() - 1 if wrapped else start.index("["))
    if first == "{" and not wrapped:
        yield from jsonl_rows(path)


def _is_json_lines(start: str) -> bool:
    """Whether the first line of a file is an object by itself, and something follows it."""
    line, _, rest = start.lstrip().partition("\n")
    if not line.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def list_items(file: TextIO, path: Path, buffer: str, opening: int) -> Iterator[Row]:
    """The items of a JSON list, decoded one at a time: `json.load` would hold the whole list in memory.

    `buffer` is what has been read of the file, `opening` where in it the list begins: with it, or within an object that
    ends with the file.
    """
    wrapped = buffer[:opening].strip() != ""
    decoder = json.JSONDecoder()
    ended = False
    start = opening + 1
    line = 1 + buffer.count("\n", 0, start)
    try:
        while True:
            space = _BETWEEN.match(buffer, start)
            item = space.end() if space else start
            line += buffer.count("\n", start, item)
            if buffer.startswith("]", item):
                _check_end(path, line, buffer[item + 1 :] + file.read(), wrapped=wrapped)
                return
            reason = ""
            try:
                value, start = decoder.raw_decode(buffer, item)
                # An item that touches the end of what was read may go on: 12 could be the beginning of 123.
                whole = ended or start < len(buffer)
            except RecursionError as error:
                raise _broken_list(path, line, json_reason(error)) from None
            except ValueError as error:
                whole = False
                reason = json_reason(error)
            if whole:
                yield Row(f"{path}:{line}", value)
                line += buffer.count("\n", item, start)
                continue
            if ended:
                raise _broken_list(path, line, reason if item < len(buffer) else "the list breaks off")
            # As much again as is there already: an item of many blocks is then decoded a few times, not once a block.
            more = file.read(max(_BLOCK, len(buffer) - item))
            buffer = buffer[item:] + more
            start = 0
            ended = not more
    except UnicodeDecodeError:
        raise not_utf8(f"{path}:{line}") from None


def _check_end(path: Path, line: int, rest: str, *, wrapped: bool) -> None:
    """Make sure that nothing follows a list of rows but the end of the object that it is in; DataError otherwise."""
    end = 0
    if wrapped:
        # As the object would go on.
        begun = '{"":[]'
        try:
            end = json.JSONDecoder().raw_decode(begun + rest)[1] - len(begun)
        except (ValueError, RecursionError) as error:
            raise _broken_list(path, line, f"{json_reason(error)}, behind the list") from None
    more = rest[end:].lstrip()
    if more:
        line += rest.count("\n", 0, len(rest) - len(more))
        raise DataError(
            f"{path}:{line}: found {more[:20]!r} behind the end of the rows, expected nothing; make one list of them, "
            "or a file of JSON lines (.jsonl)."
        )


def _broken_list(path: Path, line: int, reason: str) -> DataError:
    return DataError(f"{path}:{line}: invalid JSON ({reason}); expected a list of rows.")


def tsv_rows(path: Path) -> Iterator[Row]:
    """As `csv_rows`, with tabs between the columns."""
    yield from csv_rows(path, "\t")


def csv_rows(path: Path, comma: str = ",") -> Iterator[Row]:
    """Rows by the names in the first line, each cell as text; what is JSON in them is found where columns are known."""
    # The default of 128 KiB a field is less than a long conversation; a C long is the most the module takes.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # As the csv module wants it: line ends within quotes belong to the cell.
    with _opened_text(path, newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=comma)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(header) == 1 and (mark := next((mark for mark in ";\t|," if mark in header[0]), None)):
                raise DataError(f"{path}:1: the columns are separated by {mark!r}, expected {_SEPARATORS[comma]}.")
            if twice := next((name for name in header if name and header.count(name) > 1), None):
                raise DataError(f"{path}:1: two columns are called {twice!r}; rename or remove one.")
            while True:
                # Before the row is read: a quoted cell may go over several lines, and the first one is named.
                line = reader.line_num + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    yield Row(f"{path}:{line}", value_or_error(_csv_row, header, cells, f"{path}:{line}"))
        except UnicodeDecodeError:
            raise not_utf8(f"{path}:{line}") from None
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not valid CSV ({error}).") from None


def _csv_row(header: list[str], cells: list[str], location: str) -> dict[str, Any]:
    """Cells by column."""
    if len(cells) != len(header):
        raise DataError(f"{location}: found {len(cells)} cells, expected {len(header)} ({', '.join(header[:8])}).")
    return dict(zip(header, cells, strict=True))


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, located by their number from 1."""
    import pyarrow.parquet

    with path.open("rb") as file:
        yield from _arrow_rows(
            path,
            lambda: pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS),
            "a Parquet file",
        )


def arrow_rows(path: Path) -> Iterator[Row]:
    """Rows of an Arrow file, of the random-access or the streaming kind, located by their number from 1."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:

        def batches() -> Iterator[Any]:
            try:
                file = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:  # `datasets` writes the streaming kind under the same name.
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)
                return
            for number in range(file.num_record_batches):
                yield file.get_batch(number)

        yield from _arrow_rows(path, batches, "an Arrow file")


def _arrow_rows(path: Path, batches: Callable[[], Iterable[Any]], kind: str) -> Iterator[Row]:
    # Imported here: it takes 0.4 s to load, which those who read JSON lines need not wait for.
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in rows_of(batch.slice(start, _BATCH_ROWS)):
                    number += 1
                    yield Row(f"{path}:{number}", *row)
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number + 1}: not {kind}, or a damaged one ({reason_of(error)}).") from None


def value_or_error(parse: Callable[..., Any], *arguments: Any) -> Any | DataError:
    """What `parse` returns or raises: a row that cannot be read must not end the iteration over those after it."""
    try:
        return parse(*arguments)
    except DataError as error:
        return error


def json_reason(error: Exception) -> str:
    """Why JSON could not be decoded, with the column, since the line of a JSONL file is named already."""
    if isinstance(error, json.JSONDecodeError):
        # Some of json's messages end in "at", for the position that it writes behind them.
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    # What remains of ValueError is a whole number with more digits than Python converts.
    return "nested too deeply" if isinstance(error, RecursionError) else "a number that is too long"


def not_utf8(location: str) -> DataError:
    """The error of bytes that are not UTF-8."""
    return DataError(f"{location}: not UTF-8 text; save the file as UTF-8.")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
READERS |= {f"{kind}.gz": READERS[kind] for kind in (".jsonl", ".json", ".csv", ".tsv")}
"""The reader for each file name ending."""

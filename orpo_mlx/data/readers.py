"""Rows of one data file, one after another, each with its location. A broken row is handed on as its error."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from orpo_mlx.errors import DataError, reason_of

_BLOCK = 1 << 20
_BATCH_ROWS = 512
_BETWEEN = re.compile(r"[\s,]*")


class Row(NamedTuple):
    """A row as it stands in its file."""

    location: str
    """`file:line`; for Parquet, Arrow and the Hub the row's number from 1."""
    value: Any | DataError
    """What was read, or why it cannot be."""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file, read as they are asked for.

    Raises:
        DataError: the file as a whole cannot be read: it is missing, of another kind, compressed, or breaks off.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: files of this kind are not read, expected {', '.join(READERS)}.")
    try:
        _check_kind(path)
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or reason_of(error)}).") from None


def _check_kind(path: Path) -> None:
    """Catch what is often misnamed."""
    with path.open("rb") as file:
        start = file.read(4)
    magic = {b"\x1f\x8b": "compressed with gzip; run gunzip on it", b"PAR1": "a Parquet file; name it .parquet"}
    magic |= {b"PK\x03\x04": "a zip archive; unpack it", b"\xff\xfe": "UTF-16 text; save it as UTF-8"}
    for mark, words in magic.items():
        if start.startswith(mark) and not (mark == b"PAR1" and path.suffix.lower() == ".parquet"):
            raise DataError(f"{path}:1: the file is {words}.")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                location = f"{path}:{number}"
                yield Row(location, _or_error(_parse_json, text, location))


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of rows, read a block at a time; a `.json` file that begins with an object is taken for JSON lines."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            first = next((character for line in file if (character := line.lstrip()[:1])), "")
        except UnicodeDecodeError:
            raise _not_utf8(f"{path}:1") from None
        if first not in ("[", "{", ""):
            raise DataError(f"{path}:1: found text that begins with {first!r}, expected a JSON list of rows.")
        if first == "[":
            file.seek(0)
            yield from _list_items(file, path)
    if first == "{":
        yield from _jsonl_rows(path)


def _list_items(file: TextIO, path: Path) -> Iterator[Row]:
    decoder, buffer, ended = json.JSONDecoder(), "", False
    while "[" not in buffer:
        buffer += file.read(_BLOCK)
    start = buffer.index("[") + 1
    line = 1 + buffer.count("\n", 0, start)
    try:
        while True:
            space = _BETWEEN.match(buffer, start)
            item = space.end() if space else start
            line += buffer.count("\n", start, item)
            if buffer.startswith("]", item):
                return
            try:
                value, start = decoder.raw_decode(buffer, item)
                # An item that touches the end of what was read may go on.
                whole, reason = ended or start < len(buffer), ""
            except RecursionError as error:
                raise _broken_list(path, line, _json_reason(error)) from None
            except ValueError as error:
                whole, reason = False, _json_reason(error)
            if whole:
                yield Row(f"{path}:{line}", value)
                line += buffer.count("\n", item, start)
                continue
            if ended:
                raise _broken_list(path, line, reason if item < len(buffer) else "the list breaks off")
            more = file.read(max(_BLOCK, len(buffer) - item))
            buffer, start, ended = buffer[item:] + more, 0, not more
    except UnicodeDecodeError:
        raise _not_utf8(f"{path}:{line}") from None


def _broken_list(path: Path, line: int, reason: str) -> DataError:
    return DataError(f"{path}:{line}: invalid JSON ({reason}); expected a list of rows.")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows by the names in the first line; a cell that holds a JSON list or object is read as one."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise DataError(f"{path}:1: the columns are separated by {mark!r}, expected commas.")
            while True:
                line = reader.line_num + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    yield Row(f"{path}:{line}", _or_error(_csv_row, header, cells, f"{path}:{line}"))
        except UnicodeDecodeError:
            raise _not_utf8(f"{path}:{line}") from None
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not valid CSV ({error}).") from None


def _csv_row(header: list[str], cells: list[str], location: str) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(f"{location}: found {len(cells)} cells, expected {len(header)} ({', '.join(header[:8])}).")
    return {name: _cell(text, name, location) for name, text in zip(header, cells, strict=True)}


def _cell(text: str, name: str, location: str) -> Any:
    start = text.lstrip()[:2]
    if start in ("[{", "[["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if text.lstrip().startswith("[{'"):
                raise DataError(f"{location}: {name!r} is a list as Python prints it, expected JSON.") from None
    return text


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with path.open("rb") as file:
        yield from _arrow_rows(
            path,
            lambda: pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS),
            "a Parquet file",
        )


def _arrow_file_rows(path: Path) -> Iterator[Row]:
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
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for value in batch.slice(start, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: not {kind}, or a damaged one ({reason_of(error)}).") from None


def _or_error(parse: Callable[..., Any], *arguments: Any) -> Any | DataError:
    try:
        return parse(*arguments)
    except DataError as error:
        return error


def _parse_json(text: bytes, location: str) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise _not_utf8(location) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location}: invalid JSON ({_json_reason(error)}); expected one JSON object per line."
        ) from None


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number that is too long"


def _not_utf8(location: str) -> DataError:
    return DataError(f"{location}: not UTF-8 text; save the file as UTF-8.")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_file_rows,
}
"""File name endings that are read."""

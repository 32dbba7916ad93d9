"""From a file to `Pair`s. Every complaint names the file and the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from orpo_mlx.errors import DataError
from orpo_mlx.types import Message, Pair, Text, TokenizedPair

SPLITS = ("train", "valid", "test")
_TEXT_COLUMNS = ("prompt", "chosen", "rejected")
_ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def find_splits(path: str | Path) -> dict[str, Path]:
    """Map split names to files.

    A file is the train split alone. In a folder, a split is `train.jsonl`, `valid.jsonl` or `test.jsonl`, or the one
    file with that infix (`anything.train.jsonl`).

    Raises:
        DataError: nothing there, no train split, or two files for one split.
    """
    path = Path(path)
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; --data takes a folder with train.jsonl, or a .jsonl file.")
    splits: dict[str, Path] = {}
    for split in SPLITS:
        exact = path / f"{split}.jsonl"
        found = [exact] if exact.is_file() else sorted(path.glob(f"*.{split}.jsonl"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise DataError(
                f"{path}: {len(found)} files for the {split} split ({names}); keep one, or name it {split}.jsonl."
            )
        if found:
            splits[split] = found[0]
    if "train" not in splits:
        present = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise DataError(f"{path}: no train.jsonl (or *.train.jsonl) in this folder, found {present}.")
    return splits


def load_pairs(path: str | Path) -> list[Pair | TokenizedPair]:
    """Read every row of a JSONL file, passing over blank lines, or of a `.json` file that holds a list of rows.

    A row has `prompt`, `chosen` and `rejected`, each a string or a list of `{"role", "content"}` messages, or
    `prompt_ids`, `chosen_ids` and `rejected_ids`, each a list of token ids.

    Raises:
        DataError: the file cannot be read, holds no row, or a row is not one of these; begins with `file:line`,
            or with file and row for `.json`.
    """
    path = Path(path)
    try:
        rows = _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)
        return [_parse_row(row, place) for row, place in rows] or _no_rows(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_json(line, f"{path}:{number}"), f"{path}:{number}"


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    rows = _parse_json(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: found a JSON {_kind(rows)}, expected a list of rows, or one row per line in .jsonl.")
    for number, row in enumerate(rows, 1):
        yield row, f"{path}: row {number}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _expected() -> str:
    return "prompt, chosen and rejected (or prompt_ids, chosen_ids and rejected_ids)"


def _no_rows(path: Path) -> NoReturn:
    raise DataError(f"{path}: the file has no rows; expected one JSON object with {_expected()} per line.")


def _parse_json(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text; save the file as UTF-8 JSONL.") from None
    except (ValueError, RecursionError) as error:  # A ValueError too is a number of thousands of digits.
        detail = "nested too deeply" if isinstance(error, RecursionError) else "a number that is too long"
        if isinstance(error, json.JSONDecodeError):
            detail = f"{error.msg} at column {error.colno}"
        raise DataError(f"{place}: invalid JSON ({detail}); expected one JSON object per line.") from None


def _parse_row(row: Any, place: str) -> Pair | TokenizedPair:
    if not isinstance(row, dict):
        raise DataError(f"{place}: found a JSON {_kind(row)}, expected an object with {_expected()}.")
    columns = _ID_COLUMNS if any(name in row for name in _ID_COLUMNS) else _TEXT_COLUMNS
    missing = [name for name in columns if name not in row]
    if missing:
        found = ", ".join(sorted(map(str, row))[:8]) or "no keys"
        raise DataError(
            f"{place}: the row has no {' and no '.join(map(repr, missing))}; found {found}, expected {_expected()}."
        )
    if columns is _ID_COLUMNS:
        prompt, chosen, rejected = (_token_ids(row[name], name, place) for name in columns)
        return TokenizedPair(prompt, chosen, rejected, place)
    return _pair(row, place)


def _pair(row: Mapping[str, Any], place: str) -> Pair:
    prompt, chosen, rejected = (_text(row[name], name, place) for name in _TEXT_COLUMNS)
    if not any(isinstance(text, tuple) for text in (prompt, chosen, rejected)):
        return Pair(prompt, chosen, rejected, place)
    # One side in messages makes the pair a conversation: a bare string is then one turn of it.
    return Pair(_turns(prompt, "user"), _turns(chosen, "assistant"), _turns(rejected, "assistant"), place)


def _turns(text: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def _text(value: Any, name: str, place: str) -> Text:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{place}: {name!r} is empty.")
        return _encodable(value, name, place)
    if not isinstance(value, list):
        raise DataError(f"{place}: {name!r} is a JSON {_kind(value)}, expected a string or a list of messages.")
    if not value:
        raise DataError(f"{place}: {name!r} is an empty list, expected at least one message.")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{place}: {name}[{number}] is a JSON {_kind(message)}, expected a message object.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else "nothing"
                raise DataError(f"{place}: {name}[{number}].{key} must be a string, found {found}.")
            _encodable(message[key], f"{name}[{number}].{key}", place)
    if name != "prompt" and not any(message["content"].strip() for message in value):
        raise DataError(f"{place}: {name!r} is empty.")
    return tuple(value)


def _encodable(text: str, name: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ascii(text[error.start])
        raise DataError(f"{place}: {name!r} holds half of a surrogate pair ({code}), which is not text.") from None
    return text


def _token_ids(value: Any, name: str, place: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise DataError(f"{place}: {name!r} must be a list of token ids (whole numbers from 0).")
    if not value:
        raise DataError(f"{place}: {name!r} is an empty list, expected at least one token id.")
    return tuple(value)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")

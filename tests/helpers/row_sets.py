"""Row sets by chance, and the same set as every kind of file that is read.

What Arrow cannot hold is not made: keys whose values are of several types or that stand in several orders, and keys
that are null here and something else there.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from orpo_mlx.data.sources import FileSource, HubSource, Source

Row = dict[str, Any]

TEXTS = (
    *("Hi", "Wie heißt das?\nKurz.", '"quoted", with commas', "你好，世界", "🇩🇰 👩\u200d🚀 e\u0301", "a\tb  ", " x"),
    *("null", "42", "[INST]", "{'a': 1}", '{"a": 1}', "[1, 2]", "```json\n[{}]\n```", "\u2028 \u00a0", "# no comment"),
    *("-", "\\n", "it's", "%s"),
)


def row_set(seed: int) -> list[Row]:
    """A few rows of one shape, some with tools, calls of them, nulls, a system text and template arguments."""
    rng = random.Random(seed)
    shape = rng.choice([_explicit, _strings, _implicit, _beside_prompt, _sharegpt, _messages, _ids, _rated, _alpaca])
    rows = [shape(rng, number) for number in range(rng.randint(1, 5))]
    if shape is not _ids:
        for row in rows:
            row.update(_extras(rng))
    seen: dict[tuple[str, ...], list[str]] = {}
    return [_in_order(row, (), seen) for row in rows]


def _in_order(value: Any, path: tuple[str, ...], seen: dict[tuple[str, ...], list[str]]) -> Any:
    """Objects whose keys stand in the order in which those of their column were first seen: the only one Arrow has."""
    if isinstance(value, list):
        return [_in_order(item, path, seen) for item in value]
    if not isinstance(value, dict):
        return value
    order = seen.setdefault(path, [])
    order += [name for name in value if name not in order]
    return {name: _in_order(value[name], (*path, name), seen) for name in order if name in value}


def files_of(folder: Path, rows: list[Row], *, loaders: bool = False) -> dict[str, Source]:
    """The rows as files, and through `datasets`: from memory, and (`loaders`) from the files by its own readers."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    padded = [{name: row.get(name) for name in columns} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in row.values()] for row in padded)
    table = pa.Table.from_pylist(padded)
    pq.write_table(table, folder / "rows.parquet")
    with pa.ipc.new_file(folder / "rows.arrow", table.schema) as arrow:
        arrow.write_table(table)
    found: dict[str, Source] = {
        kind: FileSource([folder / f"rows.{kind}"]) for kind in ("jsonl", "json", "csv", "parquet", "arrow")
    }
    found["datasets"] = HubSource("datasets", datasets.Dataset.from_list(padded))
    if loaders:
        for kind in ("json", "parquet"):
            path = folder / f"rows.{'jsonl' if kind == 'json' else kind}"
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(folder / "cache"))
            found[f"datasets, {kind}"] = HubSource(kind, loaded)
    return found


def _cell(value: Any) -> str:
    return "" if value is None else json.dumps(value) if isinstance(value, (dict, list, int, float)) else value


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(TEXTS) for _ in range(rng.randint(1, 3)))


def _arguments(rng: random.Random) -> Row:
    every = {
        "city": _text(rng),
        "guests": rng.randint(-3, 10**12),
        "when": {"day": rng.randint(1, 31), **({"zone": _text(rng)} if rng.random() < 0.5 else {})},
        "tags": [_text(rng) for _ in range(rng.randint(0, 2))],
        # Of few digits: the JSON reader of `datasets` keeps ten.
        "ratio": rng.randint(0, 99) / 8,
        "open": rng.random() < 0.5,
        "legs": [{"to": _text(rng), **({"km": rng.randint(0, 9)} if rng.random() < 0.5 else {})}],
    }
    # At least one: Parquet has no objects without keys.
    kept = rng.sample(list(every), rng.randint(1, len(every)))
    return {name: value for name, value in every.items() if name in kept}


def _turn(rng: random.Random, role: str, *, calls: bool = False) -> Row:
    turn: Row = {"role": role, "content": _text(rng)}
    if calls and rng.random() < 0.5:
        turn["content"] = rng.choice([None, "", "Let me see."])
        call = {"type": "function", "function": {"name": "book", "arguments": _arguments(rng)}}
        turn["tool_calls"] = [call] * rng.randint(1, 2)
    if rng.random() < 0.3:
        turn["name"] = rng.choice([None, "Ann"])
    return turn


def _prompt(rng: random.Random) -> list[Row]:
    turns = [_turn(rng, "user")]
    if rng.random() < 0.4:
        turns += [_turn(rng, "assistant", calls=True), _turn(rng, rng.choice(["user", "tool"]))]
    return turns


def _explicit(rng: random.Random, number: int) -> Row:
    return {
        "prompt": _prompt(rng),
        "chosen": [_turn(rng, "assistant", calls=True)],
        "rejected": [_turn(rng, "assistant", calls=True)],
    }


def _strings(rng: random.Random, number: int) -> Row:
    return {"prompt": _text(rng), "chosen": _text(rng), "rejected": _text(rng)}


def _implicit(rng: random.Random, number: int) -> Row:
    start = _prompt(rng)
    return {side: [*start, _turn(rng, "assistant", calls=True)] for side in ("chosen", "rejected")}


def _beside_prompt(rng: random.Random, number: int) -> Row:
    row = _implicit(rng, number)
    return {"prompt": row["chosen"][0]["content"] if number % 2 else "another", **row}


def _sharegpt(rng: random.Random, number: int) -> Row:
    start = [{"from": "human", "value": _text(rng)}]
    if rng.random() < 0.5:
        start += [{"from": "gpt", "value": _text(rng)}, {"from": "human", "value": _text(rng)}]
    sides = {side: {"from": "gpt", "value": _text(rng)} for side in ("chosen", "rejected")}
    return {"conversations": start, **sides}


def _messages(rng: random.Random, number: int) -> Row:
    return {"messages": _prompt(rng), **{side: _turn(rng, "assistant") for side in ("chosen", "rejected")}}


def _ids(rng: random.Random, number: int) -> Row:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {name: [rng.randint(0, 255) for _ in range(rng.randint(1, 4))] for name in names}


def _rated(rng: random.Random, number: int) -> Row:
    count = rng.randint(2, 4)
    return {
        "prompt": _text(rng),
        "completions": [_text(rng) for _ in range(count)],
        "scores": [float(rng.randint(0, 3)) for _ in range(count)],
    }


def _alpaca(rng: random.Random, number: int) -> Row:
    row = {"instruction": _text(rng), "input": rng.choice(["", _text(rng)]), "chosen": _text(rng), "rejected": "no"}
    return {**row, "history": [[_text(rng), _text(rng)] for _ in range(rng.randint(0, 2))]}


def _extras(rng: random.Random) -> Row:
    extras: Row = {}
    if rng.random() < 0.5:
        extras["system"] = rng.choice([None, "", _text(rng)])
    if rng.random() < 0.5:
        # A default of null in each of these schemas, so that nothing else can have made it.
        city = {"type": ["string", "null"], "default": None}
        day = {"type": "integer", **({"minimum": 1} if rng.random() < 0.5 else {})}
        properties = [{"city": city}, {"day": day}, {"city": city, "day": day}]
        parameters = {"type": "object", "properties": rng.choice(properties)}
        extras["tools"] = [{"type": "function", "function": {"name": "book", "parameters": parameters}}]
        extras["tools"] *= rng.randint(0, 2)
    if rng.random() < 0.3:
        extras["chat_template_kwargs"] = {"shout": rng.random() < 0.5}
    return extras

"""One set of rows gives one set of tokens, whatever the file.

The suite tries some dozens of sets; `python -m pytest -m slow tests/data/test_same_rows.py` tries 5,000.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx.data.pairs import NULLS_LEFT_OUT, Reading, read_pairs
from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.sources import FileSource, Source
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.types import Pair
from tests.conftest import write_model_folder, write_rows
from tests.helpers.row_sets import files_of, row_set

TEMPLATE = (
    "{% if tools %}<|start|>tools\n{{ tools | tojson }}<|end|>\n{% endif %}{% if shout %}!{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}{{ m.name }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def to_ids(tmp_path_factory: pytest.TempPathFactory) -> PairTokenizer:
    return PairTokenizer(load_tokenizer(write_model_folder(tmp_path_factory.mktemp("model"), template=TEMPLATE)))


def tokens(source: Source, to_ids: PairTokenizer) -> list[Any]:
    """Ids of every pair, reasons of rows left out, and how rows were taken, without places."""
    report = RowReport()
    rows = list(read_pairs(source, Reading(pair_ratings="all", skip_bad_rows=True), report))
    pairs = [pair for row in rows for pair in row.pairs]
    ids = [outcome[:3] if isinstance(outcome, tuple) else "refused" for outcome in to_ids.outcomes(pairs)]
    notes = Counter(note for row in rows for note in row.notes if note != NULLS_LEFT_OUT)
    return [ids, dict(report.dropped), dict(report.shapes), notes]


@pytest.mark.parametrize("count", [60, pytest.param(5_000, marks=pytest.mark.slow)])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path: Path, to_ids: PairTokenizer, count: int) -> None:
    trained = 0
    for seed in range(count):
        rows = row_set(seed)
        # The readers of `datasets` take some tenths of a second.
        found = {name: tokens(source, to_ids) for name, source in files_of(tmp_path, rows, loaders=seed < 5).items()}
        for name, each in found.items():
            assert each == found["jsonl"], (seed, name, rows)
        trained += len(found["jsonl"][0])
    assert trained > count


def call(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_nulls_that_arrow_may_have_filled_in_are_left_out_and_counted(tmp_path: Path, to_ids: PairTokenizer) -> None:
    rows = [{"prompt": "Q", "chosen": [call(**{key: 1})], "rejected": "B"} for key in "ab"]
    plain = FileSource([write_rows(tmp_path / "rows.jsonl", rows)])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = list(read_pairs(FileSource([tmp_path / "rows.parquet"]), Reading(), RowReport()))
    first = read[0].pairs[0]
    assert isinstance(first, Pair)
    assert first.chosen[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}  # type: ignore[index]
    assert [row.notes for row in read] == [(NULLS_LEFT_OUT,)] * 2
    assert tokens(FileSource([tmp_path / "rows.parquet"]), to_ids) == tokens(plain, to_ids)


def test_other_types_of_arrow_are_the_objects_they_stand_for(tmp_path: Path, to_ids: PairTokenizer) -> None:
    tool = {"name": "f", "parameters": {"b": None, "a": [1, None]}}
    rows = [{"prompt": "Q", "chosen": [call(a="1", b="2")], "rejected": "B", "tools": [tool]}]
    text = pa.string()
    sides = []
    for arguments in (pa.map_(text, text), pa.struct([("a", pa.large_string()), ("b", text), ("c", text)])):
        calls = pa.large_list(pa.struct([("function", pa.struct([("name", text), ("arguments", arguments)]))]))
        turn = pa.struct([("role", text), ("content", text), ("tool_calls", calls)])
        values = json.loads(json.dumps(rows[0]["chosen"]))
        if pa.types.is_map(arguments):
            values[0]["tool_calls"][0]["function"]["arguments"] = [("a", "1"), ("b", "2")]
        sides.append(pa.array([values], pa.large_list(turn)))
    # As `datasets` has objects that share no schema.
    tools = pa.array([json.dumps([tool])])
    if hasattr(pa, "json_"):
        tools = pa.ExtensionArray.from_storage(pa.json_(), tools)
    plain = tokens(FileSource([write_rows(tmp_path / "rows.jsonl", rows)]), to_ids)
    for side in sides:
        columns = {"prompt": pa.array(["Q"]), "chosen": side, "rejected": pa.array(["B"]), "tools": tools}
        pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
        assert tokens(FileSource([tmp_path / "rows.parquet"]), to_ids) == plain

"""Tokens of a split: counted, remembered by content, and never stale."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx.data import splits as module
from orpo_mlx.data.groups import COMPLETIONS_LEFT_OUT
from orpo_mlx.data.pairs import WEIGHTED, Reading
from orpo_mlx.data.sources import FileSource
from orpo_mlx.data.splits import (
    COMPLETION_CUT,
    PROMPT_CUT,
    Lengths,
    Split,
    tokenized_split,
    tokenizer_fingerprint,
)
from orpo_mlx.data.tokens.chat_template import SYSTEM_FOLDED, TEMPLATED_TWICE
from orpo_mlx.data.tokens.token_store import TokenStore
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.errors import DataError
from orpo_mlx.types import Pair
from tests.conftest import CHAT_TEMPLATE, write_model_folder, write_rows

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
RATED = {"prompt": "Q", "completions": ["a", "b", "c", "c"], "scores": [3, 2, 1, 1]}


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(model_folder)


def split_of(path: Path, tokenizer: Any, lengths: Lengths = Lengths(200), **reading: Any) -> Split:  # noqa: B008
    return tokenized_split(FileSource([path]), Reading(**reading), tokenizer, lengths)


def test_every_row_is_kept_or_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[Any] = [
        GOOD,
        {**GOOD, "chosen": ""},
        {**GOOD, "chosen": "B"},
        {**GOOD, "prompt": "Q" * 300},
        {"prompt": 3},
        RATED,
        {**RATED, "scores": [1, 1, 1, 1]},
        {**GOOD, "prompt": "R"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    split = split_of(path, tokenizer, pair_ratings="all", skip_bad_rows=True)
    report = split.report
    assert report.rows_read == 8
    assert report.rows_kept == 3
    assert report.dropped == {"empty_side": 1, "equal_sides": 1, "too_long": 1, "bad_row": 1, "equal_ratings": 1}
    assert report.places["too_long"] == [f"{path}:4"]
    assert [pair.location for pair in split.pairs] == [f"{path}:{line}" for line in (1, 6, 8)]
    to_ids = PairTokenizer(tokenizer)
    assert split.pairs[0] == to_ids(Pair("Q", "A", "B", f"{path}:1"))
    group = split.pairs[1]
    assert group.pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    pair = to_ids(Pair("Q", "a", "c", f"{path}:6"))
    assert (group.prompt_ids, group.completions[0], group.completions[2]) == pair[:3]
    assert [(pair.location, pair.prompt) for pair in split.raw()] == [
        (f"{path}:1", "Q"),
        (f"{path}:6", "Q"),
        (f"{path}:8", "R"),
    ]
    assert "1 left out: longer than `max_seq_length` 200" in report.summary()
    assert len(report.left_out) == 5


def test_a_bad_row_ends_it_and_leaves_no_files(tmp_path: Path, own_cache: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {"prompt": 3}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*; `skip_bad_rows` leaves such rows out and lists them"):
        split_of(path, tokenizer)
    assert list((own_cache / "tokens").iterdir()) == []


def test_a_row_the_template_refuses(tmp_path: Path) -> None:
    refuse = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}"
    tokenizer = load_tokenizer(write_model_folder(tmp_path / "model", template=refuse + CHAT_TEMPLATE))
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "no"}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: the chat template refused .*`skip_bad_rows`"):
        split_of(path, tokenizer)
    split = split_of(path, tokenizer, skip_bad_rows=True)
    assert split.report.dropped == {"bad_row": 1}
    assert "never" in split.report.left_out[0]


def test_what_is_cut_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [GOOD, {**GOOD, "prompt": "Q" * 50}, {**GOOD, "chosen": "A" * 80}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    split = split_of(path, tokenizer, Lengths(40, "keep_end"))
    assert split.report.rows_kept == 3
    assert split.report.notes == {PROMPT_CUT: 2, COMPLETION_CUT: 1}
    assert split.report.places[COMPLETION_CUT] == [f"{path}:3"]
    for pair in split.pairs:
        assert len(pair.prompt_ids) + max(map(len, pair.completions)) <= 40


def test_a_folded_system_text_is_noted(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = load_tokenizer(write_model_folder(tmp_path / "model", template=template))
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "system": "S"}])
    assert split_of(path, tokenizer).report.notes == {SYSTEM_FOLDED: 1}


def test_a_prompt_that_is_in_the_template_already_is_noted(tmp_path: Path, tokenizer: Any) -> None:
    written = {**GOOD, "prompt": "<|start|>user\nQ<|end|>\n<|start|>assistant\n"}
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "What does <|end|> mean?"}, written])
    report = split_of(path, tokenizer).report
    assert report.notes == {TEMPLATED_TWICE: 1}
    assert report.places[TEMPLATED_TWICE] == [f"{path}:3"]
    assert split_of(path, tokenizer, template_strings=False).report.notes == {}


def test_tokens_are_remembered_by_content(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "chosen": ""}])
    first = split_of(path, tokenizer)
    asked: list[Path] = []
    write = module._write

    def counted(*arguments: Any) -> TokenStore:
        asked.append(path)
        return write(*arguments)

    monkeypatch.setattr(module, "_write", counted)
    again = split_of(path, tokenizer)
    assert not asked
    assert list(again.pairs) == list(first.pairs)
    assert again.report == first.report
    other = load_tokenizer(write_model_folder(tmp_path / "model", template="x" + CHAT_TEMPLATE))
    for number, make in enumerate(
        (
            lambda: split_of(path, other),
            lambda: split_of(path, tokenizer, Lengths(201)),
            lambda: split_of(path, tokenizer, Lengths(200, "keep_end")),
            lambda: split_of(path, tokenizer, columns={"prompt": "prompt"}),
            lambda: split_of(write_rows(path, [{**GOOD, "prompt": "R"}]), tokenizer),
        ),
        1,
    ):
        make()
        assert len(asked) == number


def test_damaged_tokens_are_made_again(tmp_path: Path, own_cache: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD])
    first = list(split_of(path, tokenizer).pairs)
    (folder,) = (own_cache / "tokens").iterdir()
    (folder / "tokens.i32").write_bytes(b"\0" * 40)
    assert list(split_of(path, tokenizer).pairs) == first
    assert [entry.name for entry in (own_cache / "tokens").iterdir()] == [folder.name]


def test_without_a_folder_to_remember_in_it_still_works(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file"), "off"):
        monkeypatch.setenv("ORPO_MLX_CACHE", value)
        assert len(split_of(write_rows(tmp_path / "rows.jsonl", [GOOD]), tokenizer).pairs) == 1


def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "chosen": "B"}])
    expected = r"rows.jsonl: no pair can be used \(1 chosen and rejected are the same tokens\); the first: .*:1: "
    with pytest.raises(DataError, match=expected):
        split_of(path, tokenizer)


def test_of_several_ends_the_one_that_answers_are_given_decides_their_tokens() -> None:
    def of(end: int) -> str:
        inner = SimpleNamespace(
            backend_tokenizer=SimpleNamespace(to_str=lambda: "v", no_truncation=int, no_padding=int),
            chat_template="t",
            bos_token_id=0,
            eos_token_id=end,
        )
        return tokenizer_fingerprint(SimpleNamespace(_tokenizer=inner, eos_token_ids={1, 2}, has_chat_template=True))

    assert of(1) == of(1) != of(2)


def test_tokens_are_of_the_day_where_the_template_writes_it(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(model_folder)

    def on(day: int) -> str:
        monkeypatch.setattr(module, "date", SimpleNamespace(today=lambda: date(2026, 1, day)))
        return tokenizer_fingerprint(tokenizer)

    assert on(1) == on(2)
    tokenizer._tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    assert on(1) == on(1) != on(2)


def test_tokens_are_those_of_the_packages_that_made_them(
    tmp_path: Path, own_cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD])
    for number, name in enumerate(("mlx-lm", "transformers", "jinja2", "tokenizers"), 2):
        split_of(path, tokenizer)
        monkeypatch.setattr(module, "version_of", lambda asked, name=name: "new" if asked == name else "old")
        split_of(path, tokenizer)
        assert len(list((own_cache / "tokens").iterdir())) == number


def test_code_of_the_checkpoints_decides_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = type("Own", (SimpleNamespace,), {"__module__": "transformers_modules.own"})
    monkeypatch.setitem(sys.modules, "transformers_modules.own", SimpleNamespace(__file__=str(tmp_path / "own.py")))

    def of(code: str) -> str:
        (tmp_path / "own.py").write_text(code)
        inner = own(get_vocab=dict, eos_token_id=1, bos_token_id=0)
        return tokenizer_fingerprint(SimpleNamespace(_tokenizer=inner, eos_token_ids={1}, has_chat_template=True))

    assert of("one") == of("one") != of("two")


def test_a_checkpoints_truncation_makes_no_other_tokens(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer._tokenizer.backend_tokenizer.enable_truncation(128)
    assert tokenizer_fingerprint(tokenizer) == expected


def test_notes_are_of_rows_that_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    noted = {**GOOD, "weight": 2, "prompt": "<|start|>user\nQ<|end|>\n<|start|>assistant\n"}
    several = {**RATED, "completions": ["a", "b", "c", ""], "scores": [3, 2, 1, 0]}
    long = {"prompt": "Q" * 300}
    path = write_rows(tmp_path / "rows.jsonl", [noted, several, {**noted, "chosen": "A" * 300}, {**several, **long}])
    report = split_of(path, tokenizer, pair_ratings="all").report
    assert report.dropped == {"too_long": 2}
    assert report.notes == {WEIGHTED: 1, TEMPLATED_TWICE: 1, COMPLETIONS_LEFT_OUT: 1}
    assert report.pairs_left_out == 3
    # A completion that is empty and one that is too long: the row counts once.
    path = write_rows(tmp_path / "both.jsonl", [{**several, "completions": ["a", "b", "c" * 300, ""]}])
    report = split_of(path, tokenizer, pair_ratings="all").report
    assert report.notes == {COMPLETIONS_LEFT_OUT: 1}
    assert report.pairs_left_out == 5

"""Answers end at the end of a turn, whatever a checkpoint names as its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.models.loading import find
from orpo_mlx.types import Pair
from tests.conftest import write_model_folder

PAD, START, END = 256, 257, 258


def folder_with(
    folder: Path, *, eos: str | None, generation: Any = None, config: Any = None, template: str = ""
) -> Path:
    if template:
        write_model_folder(folder, template=template)
    else:
        write_model_folder(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = eos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if config is not None:
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, **config}))
    return folder


def test_the_end_of_a_turn_ends_an_answer_also_where_only_the_template_knows_it(tmp_path: Path) -> None:
    info = find(str(folder_with(tmp_path, eos="<|pad|>", config={"eos_token_id": PAD})))
    assert info.tokenizer is not None
    assert set(info.tokenizer.eos_token_ids) == {PAD, END}
    assert "closes a turn with <|end|>" in str(info.note)
    pair = Pair("Hi", "There", "Here", "rows:1")
    row = PairTokenizer(info.tokenizer)(pair)
    # The template ends a turn with a line break behind the mark.
    assert row.chosen_ids[-2] == END
    assert PAD not in row.chosen_ids


@pytest.mark.parametrize(
    ("generation", "config"),
    [([PAD, END], None), (None, {"eos_token_id": [PAD, END]}), (None, {"text_config": {"eos_token_id": [PAD, END]}})],
)
def test_several_ends_of_a_config_are_all_ends(generation: Any, config: Any, tmp_path: Path) -> None:
    if config and "text_config" in config:
        pytest.importorskip("mlx_lm.models.qwen2_vl")
        config = {**config, "model_type": "qwen2_vl"}
        config["text_config"]["num_hidden_layers"] = 1
    info = find(str(folder_with(tmp_path, eos="<|pad|>", generation=generation, config=config)))
    assert info.tokenizer is not None
    assert {PAD, END} <= set(info.tokenizer.eos_token_ids)
    assert info.note is None


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }}\n{% endfor %}", "{{ raise() }}"])
def test_a_template_that_closes_nothing_or_fails_adds_nothing(template: str, tmp_path: Path) -> None:
    info = find(str(folder_with(tmp_path, eos="<|end|>", template=template)))
    assert info.tokenizer is not None
    assert set(info.tokenizer.eos_token_ids) == {END}

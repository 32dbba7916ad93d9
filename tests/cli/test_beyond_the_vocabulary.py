"""A token id that the model has no row for is one sentence, whichever command is given it: MLX would read on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_mlx.cli.main import main
from tests.conftest import VOCABULARY, write_model_folder, write_rows

JUDGE = ("--judge", "rule:length=1-20", "--max-tokens", "2")
COMMANDS = {
    "inspect": ("--data", "DATA", "--model", "MODEL"),
    "score": ("--data", "DATA", "--model", "MODEL"),
    "chat": ("--model", "MODEL", "--prompt", "<|beyond|>"),
    "pairs": ("--data", "DATA", "--model", "MODEL", "--samples", "2", "--output", "OUT", *JUDGE),
    "evaluate": ("--data", "DATA", "--model", "MODEL", "--baseline-model", "WHOLE", *JUDGE),
    "compare": ("--data", "FOLDER", "--model", "MODEL", "--output", "OUT", "--methods", "orpo", "--steps", "1"),
}


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma3"])
def test_every_command_says_so(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model_folder(tmp_path / "model", kind)
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    beyond = {**tokenizer["added_tokens"][-1], "id": VOCABULARY, "content": "<|beyond|>"}
    file.write_text(json.dumps({**tokenizer, "added_tokens": [*tokenizer["added_tokens"], beyond]}))
    row = {"prompt": "Q <|beyond|>", "chosen": "A", "rejected": "B"}
    for split in ("train", "valid", "test"):
        write_rows(tmp_path / "folder" / f"{split}.jsonl", [row] * 4)
    places = {"MODEL": model, "DATA": tmp_path / "folder" / "train.jsonl", "FOLDER": tmp_path / "folder"}
    places |= {"OUT": tmp_path / "out", "WHOLE": write_model_folder(tmp_path / "whole")}
    for command, words in COMMANDS.items():
        assert main([command, *(str(places.get(word, word)) for word in words)]) == 2, command
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"orpo-mlx {command}: error: "), said
        assert f"token id {VOCABULARY} is outside the model's vocabulary of {VOCABULARY}" in said
        assert len(said) < 400

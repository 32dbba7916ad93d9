"""The documents name what the code has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer
from rich.console import Console

from orpo_mlx.config import make_config
from orpo_mlx.convert import build_parser
from orpo_mlx.data import Reading
from orpo_mlx.gguf_file import BLOCKS
from orpo_mlx.gguf_models import ARCHITECTURES
from orpo_mlx.inspection import inspect_splits
from orpo_mlx.modes import MODES
from orpo_mlx.reporting import Reporter
from orpo_mlx.row_report import REASONS
from orpo_mlx.rows import READERS
from orpo_mlx.shapes import PAIRINGS, SHAPES
from orpo_mlx.shrinking import MODES as MODES_OF_QUANTISATION
from orpo_mlx.sources import SPLIT_NAMES, FileSource
from orpo_mlx.splits import Lengths, tokenized_split
from orpo_mlx.tokenization import TRUNCATIONS
from orpo_mlx.train import train
from orpo_mlx.verification import EXACT, MERGED, ROUNDED
from tests.conftest import write_rows

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA = (DOCS / "data.md").read_text(encoding="utf-8")


def test_every_shape_has_a_row() -> None:
    for shape in SHAPES:
        assert f"| {shape.name} |" in DATA, shape.name


@pytest.mark.parametrize("names", [REASONS, TRUNCATIONS, PAIRINGS, READERS, *SPLIT_NAMES.values()])
def test_every_name_is_there(names: tuple[str, ...]) -> None:
    for name in names:
        assert name in DATA, name


def test_every_key_of_inspect_is_there(tmp_path: Path, model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    split = tokenized_split(FileSource([path]), Reading(), tokenizer, Lengths(100))
    figures = inspect_splits({"train": split}, tokenizer, batch_size=1, micro_batch_tokens=64, seed=0)
    for table in (figures, figures["splits"]["train"], figures["splits"]["train"]["length_bias"]):
        for key in table:
            assert f"`{key}`" in DATA, key


def test_commands_bounds_and_types_of_conversions_are_there() -> None:
    text = (DOCS / "converting.md").read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line)
            if "scripts/convert.py" in words:
                build_parser().parse_args(words[2:])
    for name in (*ARCHITECTURES, *(block[0] for block in BLOCKS.values()), *MODES_OF_QUANTISATION):
        assert name in text, name
    assert f"worst {EXACT.worst:.0e}".replace("e-0", "e-") in text
    assert f"worst {MERGED.worst:.0e}".replace("e-0", "e-") in text
    assert f"mean {ROUNDED.mean}" in text


def test_every_file_of_an_adapter_path_is_there(settings: dict[str, Any], data: Path) -> None:
    (data / "train.jsonl").write_text((data / "train.jsonl").read_text() + "{\n")
    settings |= {"method": "dpo", "skip_bad_rows": True, "save_best": True, "report": True}
    train(make_config(settings), Reporter(Console(quiet=True)))
    text = (DOCS / "resuming.md").read_text(encoding="utf-8")
    for path in Path(settings["adapter_path"]).rglob("*"):
        name = "checkpoints/step-0000040/" if path.name.startswith("step-") else path.name
        assert f"| `{name}` |" in text or path.name == "checkpoints", path


def test_every_memory_mode_is_there() -> None:
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    for mode in (*MODES, "auto"):
        assert f"`{mode}`" in text or f"| {mode} |" in text, mode

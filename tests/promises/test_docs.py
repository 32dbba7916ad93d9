"""The documents name what the code has."""

from __future__ import annotations

import ast
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx import errors
from orpo_mlx.cli.convert import build_parser
from orpo_mlx.config.flags import with_flags
from orpo_mlx.convert.quantisation import QUANTISATION_MODES
from orpo_mlx.convert.verify import EXACT, MERGED, ROUNDED
from orpo_mlx.data.pairs import Reading
from orpo_mlx.data.readers import READERS
from orpo_mlx.data.row_counts import REASONS
from orpo_mlx.data.shapes.formats import SHAPES
from orpo_mlx.data.shapes.ratings import PAIRINGS
from orpo_mlx.data.sources import SPLIT_NAMES, FileSource
from orpo_mlx.data.splits import Lengths, tokenized_split
from orpo_mlx.data.statistics import inspect_splits
from orpo_mlx.data.tokens.truncation import TRUNCATIONS
from orpo_mlx.engine.modes import MODES
from orpo_mlx.losses import with_reference
from orpo_mlx.losses.recipe import describe_methods, make_recipe
from orpo_mlx.losses.registry import METHODS
from orpo_mlx.models.gguf.architectures import ARCHITECTURES
from orpo_mlx.models.gguf.file import BLOCKS
from tests.conftest import write_rows
from tests.helpers import float64_losses
from tests.helpers.quiet_training import run_quietly
from tests.losses.test_losses import as_logps

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
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
    for name in (*ARCHITECTURES, *(block[0] for block in BLOCKS.values()), *QUANTISATION_MODES):
        assert name in text, name
    assert f"worst {EXACT.worst:.0e}".replace("e-0", "e-") in text
    assert f"worst {MERGED.worst:.0e}".replace("e-0", "e-") in text
    assert f"mean {ROUNDED.mean}" in text


@pytest.mark.usefixtures("undrawn")
def test_every_file_of_an_adapter_path_is_there(settings: dict[str, Any], data: Path) -> None:
    (data / "train.jsonl").write_text((data / "train.jsonl").read_text() + "{\n")
    settings |= {"method": "dpo", "skip_bad_rows": True, "save_best": True, "report": True}
    run_quietly(settings)
    text = (DOCS / "resuming.md").read_text(encoding="utf-8")
    for path in Path(settings["adapter_path"]).rglob("*"):
        name = "checkpoints/step-0000040/" if path.name.startswith("step-") else path.name
        assert f"| `{name}` |" in text or path.name == "checkpoints", path


def test_every_memory_mode_is_there() -> None:
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    for mode in (*MODES, "auto"):
        assert f"`{mode}`" in text or f"| {mode} |" in text, mode


def test_every_module_is_in_the_table_of_its_room_and_no_other() -> None:
    package = DOCS.parent / "orpo_mlx"
    rooms = {"the ground": package, "above `memory/`": package}
    told, room, inner = set(), package, ""
    for line in (DOCS / "architecture.md").read_text(encoding="utf-8").splitlines():
        head = line.removeprefix("| ").split(" |")[0]
        if line.startswith("| ") and (head in rooms or (package / head.strip("`")).is_dir()):
            room = rooms.get(head, package / head.strip("`"))
        elif line.startswith("| `"):
            inner = head.split("`")[1] if "`: " in head else ""
            told |= {room / inner / name for name in re.findall(r"`(\w+\.py)`", head)}
    found = set(package.rglob("*.py")) - set(package.glob("*/**/__init__.py"))
    assert sorted(map(str, told ^ found)) == []


def messages() -> list[str]:
    """Every text in the package as a command prints it, with `…` for what is filled in."""
    found = []
    for path in (DOCS.parent / "orpo_mlx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [with_flags(text) for text in found]


def test_every_message_and_class_of_error_is_there_and_in_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    classes = {kind.__name__ for kind in kinds if kind is not errors.UserError}
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    first = [line.split("`")[1] for line in rows]
    known = messages()
    for phrase in set(first) - classes:
        pattern = re.compile(".*".join(map(re.escape, phrase.split("…"))), re.S)
        assert any(pattern.search(message) for message in known), phrase
    assert classes <= set(first)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S)


def test_the_example_of_a_new_method_works(settings: dict[str, Any]) -> None:
    loss_code, oracle_code = python_blocks("adding_a_method.md")
    tables: tuple[dict[str, Any], ...] = (METHODS, float64_losses.ORACLES)
    before = [dict(table) for table in tables]
    try:
        exec(loss_code, dict(vars(with_reference)))
        exec(oracle_code, dict(vars(float64_losses)))
        example = float64_losses.ORACLES["rdpo"]
        pairs = {"c": [-3.0, -40.0], "r": [-9.0, -11.0], "nc": [2, 7], "nr": [5, 3], "rc": [-4.0, -30.0]}
        x = {name: np.array(values, np.float64) for name, values in pairs.items()} | {"rr": np.array([-8.0, -12.5])}
        for parameters in example.tries:
            recipe = make_recipe("rdpo", parameters)
            assert recipe.needs_reference
            found = np.array(recipe.loss(as_logps(x)).losses)
            for row in range(2):
                c, r, nc, nr, rc, rr = (float(x[name][row]) for name in ("c", "r", "nc", "nr", "rc", "rr"))
                z = parameters["beta"] * ((c - rc) - (r - rr)) + parameters["alpha"] * (nc - nr)
                assert found[row] == pytest.approx(math.log1p(math.exp(-z)), rel=1e-5)
            np.testing.assert_allclose(found, example.loss(x, **parameters), rtol=1e-5)
        assert "rdpo" in describe_methods()
        run_quietly(settings | {"method": "rdpo", "alpha": 0.05})
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)

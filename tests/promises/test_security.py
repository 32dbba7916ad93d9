"""What SECURITY.md promises."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_mlx.cli.train import main
from orpo_mlx.files import json_text
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.text import printable, printable_lines, redacted
from tests.conftest import make_pairs, write_id_rows
from tests.helpers.quiet_training import flags

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = sorted((ROOT / "orpo_mlx").rglob("*.py"))
TOKEN = "hf_" + "aB3" * 9
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_no_module_evaluates_text_or_unpickles(path: Path) -> None:
    forbidden_modules = {"pickle", "dill", "joblib", "marshal", "shelve", "torch"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            assert name not in ("eval", "exec", "compile", "__import__"), f"{path.name}:{node.lineno}"
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "np.load":
                assert ast.unparse(keywords["allow_pickle"]) == "False", f"{path.name}:{node.lineno}"
            assert "shell" not in keywords, f"{path.name}:{node.lineno}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        assert not {name.split(".")[0] for name in names} & forbidden_modules, path.name


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert printable(EVIL).isprintable()
    assert printable_lines(f"a\n{EVIL}").count("\n") == 1
    out = io.StringIO()
    Reporter(Console(file=out, force_terminal=False)).say(f"[red]{EVIL}[/red]")
    assert out.getvalue().rstrip("\n").isprintable()
    assert "[red]" in out.getvalue()
    text = json_text({"place": EVIL, "name": "é 漢字"})
    assert all(line.isprintable() for line in text.split("\n"))
    assert json.loads(text) == {"place": EVIL, "name": "é 漢字"}


def test_a_files_name_reaches_no_terminal_as_it_is(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"rows{EVIL}.jsonl"
    write_id_rows(path, make_pairs(6))
    assert main([*flags(settings), "--data", str(path)]) == 0
    path.write_text(path.read_text() + "{\n")
    assert main([*flags(settings), "--data", str(path)]) == 2
    captured = capsys.readouterr()
    for line in (captured.out + captured.err).split("\n"):
        assert line.isprintable(), line
    for file in Path(settings["adapter_path"]).rglob("*.json*"):
        assert all(line.isprintable() for line in file.read_text().split("\n")), file


def test_tokens_are_in_no_file_and_no_message(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret of mine")
    assert redacted(f"x {TOKEN}, a secret of mine") == "x [token], [token]"
    folder = tmp_path / TOKEN
    write_id_rows(folder / "train.jsonl", make_pairs(6))
    assert main([*flags(settings), "--data", str(folder)]) == 0
    assert main([*flags(settings), "--data", str(folder / "nothing")]) == 2
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    for file in Path(settings["adapter_path"]).rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file
            assert b"a secret of mine" not in file.read_bytes(), file


def test_code_beside_a_model_runs_only_when_asked(settings: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(settings["model"], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)")
    assert main([*flags(settings), "--model", str(model)]) == 2
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(settings["model"], model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert main([*flags(settings), "--model", str(model)]) == 2
    assert not Path("ran").exists()

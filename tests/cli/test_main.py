"""The one command for all programs of the package."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import orpo_mlx
from orpo_mlx.cli.main import COMMANDS, main
from tests.conftest import write_rows

_HEAVY = (
    "mlx.nn",
    "numpy",
    "rich",
    "mlx_lm",
    "transformers",
    "datasets",
    "matplotlib",
    "pyarrow",
    "huggingface_hub",
)


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    for name, command in COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name] and line.endswith(command.summary)]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"orpo-mlx {orpo_mlx.__version__}\n"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trian", "orpo-mlx: error: no command 'trian', expected one of .*; did you mean train?\n"),
        ("zzz\x1b", r"orpo-mlx: error: no command 'zzz\\x1b', expected one of .*[a-z]\.\n"),
    ],
)
def test_a_command_that_is_unknown(word: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert re.fullmatch(expected.replace("?", r"\?"), capsys.readouterr().err)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_module_with_main(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    assert (module.__doc__ or "").strip()
    assert callable(module.main)
    with pytest.raises(SystemExit) as caught:
        main([name, "--no-such-flag"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_arguments_and_status_are_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [])
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert main(["score", "--data", str(rows), "--output", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "nothing" in first
    assert f"--output {tmp_path}" in second


MISTYPED = (
    "train --method orpoo", "train --optimizer adamww", "train --memory fsat", "train --iters 3 --epochs 2",
    "train --resume --method orpoo", "fit --method orpoo", "fit --memory fsat", "inspect --data d --truncate x",
    "compare --output o --methods orpoo", "chat --temp -1", "score --data nowhere.jsonl --model m",
    "evaluate --data d --judge rule:nope", "evaluate --data nowhere --judge rule:plain --baseline-model m",
    "pairs --data d --output o --judge rule:nope", "pairs --data d --output o --judge rule:plain --temp -1",
)  # fmt: skip


def test_what_needs_no_model_loads_no_library() -> None:
    asked = [("train --list-methods", 0), ("train --metod dpo", 2), ("train --batch-size 0", 2), ("--help", 0)]
    asked += [(f"{name} --help", 0) for name in COMMANDS]
    asked += [(mistyped, 2) for mistyped in MISTYPED]
    # All in one process, one after the other: what one of them loads is seen at once, and a process takes its time.
    code = (
        "import sys, orpo_mlx.cli.main\n"
        "for words in sys.argv[1:]:\n"
        "    try: status = orpo_mlx.cli.main.main(words.split())\n"
        "    except SystemExit as ended: status = ended.code\n"
        f"    print('>>', words, status, sorted(set({_HEAVY!r}) & set(sys.modules)))"
    )
    words = [command for command, _ in asked]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(">> ")]
    assert found == [f">> {command} {status} []" for command, status in asked]


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "orpo_mlx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"orpo-mlx {orpo_mlx.__version__}\n"


def test_no_advice_is_what_the_command_line_has(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = shutil.copytree(model_folder, tmp_path / ("m" * 200) / "n")
    settings = json.loads((foreign / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": [None, "own_code.Own"]}, "tokenizer_class": "Own"}
    (foreign / "tokenizer_config.json").write_text(json.dumps({**settings, **code}))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "text": "a"}])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    # The flag that is advised where it is not given, and what the message says where it is.
    kinds: tuple[tuple[str, list[str], Path, Path, str], ...] = (
        ("--trust-remote-code", [], pairs, foreign, "read it, then give --trust-remote-code."),
        ("--method sft", ["--method", "sft"], rows, model_folder, "expected prompt and completion"),
        ("--skip-bad-rows", ["--skip-bad-rows"], rows, model_folder, "no pair can be used"),
    )
    for flag, given, data, model, said in kinds:
        assert main(["inspect", "--data", str(data), "--model", str(model), *given]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert (flag in err) == (not given)
        assert len(err) <= 400

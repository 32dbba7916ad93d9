"""Every command in README.md and docs/ parses, and runs; every file they lead to is there."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.compare import parse_request
from orpo_mlx.cli.fit import fit_request
from orpo_mlx.cli.main import COMMANDS
from orpo_mlx.cli.memory import benchmark_request
from orpo_mlx.config.command_line import resolve
from tests.conftest import write_rows
from tests.helpers.documented_commands import DOCUMENTS, LINES, ROOT, Line, lines_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Three screens, and the tree of the repository.
_SCREENS = 170


def without_files(words: Sequence[str]) -> list[str]:
    """Flags only: config files that the documents name are the reader's own, or tested in test_recipes.py."""
    files = {index + shift for index, word in enumerate(words) if word in ("-c", "--config") for shift in (0, 1)}
    return [word for index, word in enumerate(words) if index not in files]


def parse_training(words: Sequence[str]) -> object:
    """A training run's settings; `--print-config` would leave."""
    return resolve([word for word in without_files(words) if word != "--print-config"])


# Commands whose flags are checked by more than their own parser.
PARSE: dict[str, Callable[[Sequence[str]], object]] = {
    "train": parse_training,
    "fit": lambda words: fit_request(without_files(words)),
    "compare": parse_request,
    "memory": benchmark_request,
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.document}: {' '.join(line.words)[:60]}")
def test_a_command_names_files_and_flags_that_exist(line: Line) -> None:
    ours = line.ours()
    if ours is not None:
        name, words = ours
        if name in PARSE:
            PARSE[name](words)
        else:
            importlib.import_module(COMMANDS[name].module).build_parser().parse_args(words)
    elif line.words[0].startswith("scripts/"):
        text = (ROOT / line.words[0]).read_text(encoding="utf-8")
        assert all(flag in text for flag in line.words[1:])
    elif line.words[:2] != ["pip", "install"]:
        assert line.words[1] == "-m"
        assert line.words[2] in ("pytest", "mlx_lm", "pip")
        files = [word for word in line.words[3:] if word.startswith("tests/")]
        assert all((ROOT / file).is_file() for file in files)


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    assert len(README.splitlines()) <= _SCREENS
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert "(docs/README.md)" in README
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


# What cannot be run here: it needs the network, other machines, this very suite, or does not end.
# `runs/exercise`: minutes, and it sets everything itself.
NOT_RUN = ("scripts/setup.sh", "pip", "pytest", "mlx.launch", "server", "watch", "--push-to-hub", "runs/exercise")

# Models and data that a reader has, and tests do not.
SUBSTITUTES = [
    (r"(mlx-community|Qwen|HuggingFaceTB)/\S+", "model"),
    (r"my_pairs/(test\.jsonl)?", r"data/\1"),
    (r"\.\./shared/data", "data"),
    (r"pairs\.jsonl", "data/train.jsonl"),
    (r"(?:data/configs/\S+|lora)\.yaml", "run.yaml"),
    (r"8000", "0"),  # A port that may be taken here.
    (r"--keep-quantized", "--verify"),  # The tiny GGUF file has no quantised blocks to keep.
]

_SMALL = ["--model", "model", "--data", "data", "--batch-size", "2", "--max-seq-length", "256"]
_TRAIN = [*_SMALL, "--no-memory-check", "--samples", "1"]
# What makes a command small; a flag given twice has its last value.
ADDED = {
    "train": _TRAIN,
    "fit": _SMALL,
    "inspect": _SMALL,
    "memory": [*_SMALL, "--iters", "1"],
    "compare": [
        *_SMALL, "--methods", "orpo,dpo", "--seeds", "1", "--steps", "2", "--learning-rates", "1e-3", "--beta-factors",
        "", "--sanity", "", "--valid-pairs", "2", "--test-pairs", "2", "--curve-points", "1",
    ],
    "chat": ["--max-tokens", "4"],
    "doctor": ["--quick"],
    "convert peft-to-mlx": ["--overwrite"],
    "convert mlx-to-peft": ["--overwrite"],
    "generate": ["--max-tokens", "4"],
}  # fmt: skip


def as_run(line: Line) -> list[str] | None:
    """The words to run for a line of a document, or None where it is not run."""
    if any(word in NOT_RUN for word in line.words):
        return None
    ours = line.ours()
    if ours is None:
        name, words = line.words[3], [sys.executable, *line.words[1:]]
    else:
        name, words = ours[0], [sys.executable, "-m", "orpo_mlx", ours[0], *ours[1]]
    for pattern, replacement in SUBSTITUTES:
        words = [re.sub(f"^{pattern}$", replacement, word) for word in words]
    kind = f"{name} {ours[1][0]}" if ours and ours[1] else name
    # The tiny model is narrower than the groups of 64 that are the default.
    narrow = ["--group-size", "32"] if "--quantize" in words else []
    return [*words, *narrow, *ADDED.get(name, ADDED.get(kind, []))]


def run(words: Sequence[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ORPO_MLX_CACHE": str(folder / "cache")}
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}"
    return done.stdout


@pytest.fixture
def data_and_model(tmp_path: Path, model_folder: Path) -> Path:
    """A folder with data and a model."""
    (tmp_path / "model").symlink_to(model_folder)
    for split, count in (("train", 8), ("valid", 4), ("test", 4)):
        rows: list[dict[str, Any]] = [
            {"prompt": f"{split} {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {'so ' * n}{n}."}
            for n in range(count)
        ]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    return tmp_path


@pytest.fixture
def readers_folder(data_and_model: Path) -> Path:
    """A folder with what the documents take for granted: data, a model, a run, a GGUF file, a PEFT adapter."""
    from tests.models.gguf.test_loading import write_gguf

    tmp_path = data_and_model
    (tmp_path / "run.yaml").write_text("method: dpo\nmodel: model\ndata: data\n")
    write_gguf(tmp_path / "model.Q4_K_M.gguf")
    program = [sys.executable, "-m", "orpo_mlx"]
    run([*program, "train", *_TRAIN], tmp_path)
    run([*program, "convert", "mlx-to-peft", "adapters", "lora-from-peft", "--model", "model"], tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if lines_of(path)], ids=lambda path: path.name)
def test_every_command_runs_one_after_the_other(path: Path, readers_folder: Path) -> None:
    for line in lines_of(path):
        words = as_run(line)
        if words is not None:
            run(words, readers_folder)


def python_of(path: Path) -> list[str]:
    """The Python blocks of a document, on a tiny model for as many steps as it takes."""
    small = (
        "batch_size=2, max_seq_length=256, memory_check=False, samples=0, val_batches=1, test_batches=0, report=False"
    )
    return [
        block.replace("mlx-community/Qwen3-0.6B-4bit", "model")
        .replace("my_pairs/", "data")
        .replace("iters=100", f"iters=2, {small}")
        .replace("iters=120", "iters=4")
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    ]


def test_the_readmes_python_runs_and_is_short(
    data_and_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = python_of(ROOT / "README.md")
    assert f"<!-- python example -->\n```python\n{block.splitlines()[0]}" in README
    assert len(block.splitlines()) <= 15
    monkeypatch.chdir(data_and_model)
    exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"adapters 0\.0\d+", lines[-2])
    assert re.fullmatch(r"valid [01]\.\d+", lines[-1])
    assert [line.split()[0] for line in lines if re.fullmatch(r"\d \d+\.\d+ \d\.\d+", line)] == ["0", "2"]


def test_the_python_of_the_python_document_runs(
    data_and_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_and_model)
    names: dict[str, Any] = {}
    for block in python_of(ROOT / "docs" / "python.md"):
        exec(block, names)
    assert names["result"].steps == 4
    assert "Goes on from step 2" in capsys.readouterr().out

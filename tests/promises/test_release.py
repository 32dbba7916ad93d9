"""What is sent out: a wheel and a source archive, installed where there is no repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import orpo_mlx
from orpo_mlx.cli.main import COMMANDS
from orpo_mlx.losses.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent.parent
_IMPORT_SECONDS = 0.3
_OLD_PYTHONS = ((3, 11), (3, 10))
_ARITHMETIC = (
    "test_train", "test_python_api", "test_files", "training/checkpoints/test_resume", "models/test_adapters",
    "training/test_loop", "training/test_prepare", "training/test_data_order", "engine/test_memory_modes",
    "training/references/test_reference_store", "engine/test_pair_scorer", "losses/test_losses", "engine/test_lm_head",
    "engine/test_shared_prompt",
    "engine/test_segmented_backward", "engine/functions/test_patched_layers", "training/references/test_reference",
    "models/stored/test_hf_config", "data/tokens/test_tokenization", "promises/test_mlx_lm_tools", "cli/test_score",
)  # fmt: skip
_USER = """from orpo_mlx import TrainingConfig
from orpo_mlx.config.checks import make_config
config: TrainingConfig = make_config({"method": "dpo"})
size: int = config.batch_size
"""
_CALLER = """import orpo_mlx.train
from orpo_mlx import TrainingCallback, TrainingConfig, TrainingResult, run_training


class Watch(TrainingCallback):
    def on_train_loss_report(self, train_info: dict[str, object], /) -> None:
        print(train_info)


result: TrainingResult = run_training(TrainingConfig(method="dpo"), callbacks=[Watch()])
accuracy: float = result.after["valid"]["rewards/accuracies"]
steps: int = result.steps
"""


def run(*words: object, cwd: Path, status: int = 0, **environment: str) -> str:
    """Output and errors of a program that knows nothing of this repository."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout[-3000:]
    return done.stdout


def environment(folder: Path, *requirements: object, python: str = sys.executable) -> Path:
    """The scripts folder of a new virtual environment; the test is left out where no package index can be reached."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    bin_folder = folder / "bin"
    words = [bin_folder / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=folder)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip(f"pip finds no {requirements}: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return bin_folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the source archive, built of a copy of what is under version control or beside it."""
    folder = tmp_path_factory.mktemp("release")
    source = shutil.copytree(
        ROOT, folder / "source", ignore=shutil.ignore_patterns(".git", ".venv", "venv", "*.egg-info", "build", "runs")
    )
    tools = environment(folder / "tools", "build", "setuptools>=77")
    run(tools / "python", "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=source)
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def installed(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment that has the wheel and what it depends on, and nothing else."""
    extra = "[cpu]" if sys.platform == "linux" else ""
    return environment(tmp_path_factory.mktemp("installed") / "venv", f"{archives['wheel']}{extra}")


def test_versions_agree() -> None:
    assert version("orpo-mlx") == orpo_mlx.__version__


def test_what_runs_on_other_versions_is_there() -> None:
    assert [name for name in _ARITHMETIC if not (ROOT / "tests" / f"{name}.py").is_file()] == []


@pytest.mark.slow
def test_the_source_archive_has_all_that_the_tests_need(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "orpo_mlx/py.typed", "orpo_mlx/cli/main.py", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md",
        "docs/data.md", "data/train.jsonl", "data/facts.json", "scripts/setup.sh", "tests/conftest.py",
        "tests/helpers/float64_losses.py",
    ):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(installed: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    command, away = installed / "orpo-mlx", tmp_path / "away"
    away.mkdir()
    listed = run(command, "--help", cwd=away)
    assert all(name in listed for name in COMMANDS)
    for name in COMMANDS:
        assert run(command, name, "--help", cwd=away).startswith("usage: ")
    assert all(name in run(command, "train", "--list-methods", cwd=away) for name in METHODS)
    small = ["--batch-size", "2", "--iters", "2", "--samples", "0", "--no-memory-check"]
    paths = ["--model", settings["model"], "--data", settings["data"], "--adapter-path", away / "adapters"]
    run(command, "train", *paths, *small, cwd=away, ORPO_MLX_CACHE="off")
    assert (away / "adapters" / "adapters.safetensors").is_file()
    assert (away / "adapters" / "report.html").is_file()
    # The live page is made of files beside the modules.
    assert "can be watched at http://127.0.0.1:" in run(
        command, "train", *paths, *small, "--watch", "0", cwd=away, ORPO_MLX_CACHE="off"
    )


@pytest.mark.slow
def test_without_the_demo_data_a_sentence_says_what_is_missing(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "orpo-mlx", "train", cwd=tmp_path, status=2)
    assert len(said.splitlines()) == 1
    assert "--data data: no such file or folder; expected a folder with a train split" in said


@pytest.mark.slow
def test_types_are_seen_from_outside(installed: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed / "python", "user.py"]
    (tmp_path / "user.py").write_text(_USER)
    assert "Success" in run(*words, cwd=tmp_path)
    (tmp_path / "user.py").write_text(_USER.replace("size: int", "size: str"))
    assert "Incompatible types in assignment" in run(*words, cwd=tmp_path, status=1)
    (tmp_path / "user.py").write_text(_CALLER)
    assert "Success" in run(*words, cwd=tmp_path)
    (tmp_path / "user.py").write_text(_CALLER.replace("[Watch()]", "[3]").replace("steps: int", "steps: str"))
    assert "Found 2 errors" in run(*words, cwd=tmp_path, status=1)


@pytest.mark.slow
def test_importing_takes_little_beyond_mlx(installed: Path, tmp_path: Path) -> None:
    code = "import time; begin = time.process_time(); import {}; print(time.process_time() - begin)"

    def seconds(name: str) -> float:
        found = [run(installed / "python", "-c", code.format(name), cwd=tmp_path) for _ in range(5)]
        return min(float(text.splitlines()[-1]) for text in found)

    # MLX's core alone would leave out what every user of it imports.
    assert seconds("orpo_mlx") - seconds("mlx.core") < _IMPORT_SECONDS


def lower_bounds(folder: Path, python: str) -> Path:
    """Constraints for pip: the lowest version that each requirement in pyproject.toml allows, extras included."""
    constraints = folder / "oldest.txt"
    words = ["-m", "uv", "pip", "compile", ROOT / "pyproject.toml", "--all-extras", "--no-deps", "--no-header"]
    words += ["--no-annotate", "--resolution", "lowest-direct", "--python", python, "--output-file", constraints]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=folder)
    if done.returncode and "error sending request" in done.stderr:
        pytest.skip(f"uv reaches no package index: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return constraints


def python_of_the_oldest() -> str:
    """A Python for which the oldest versions were built; the test is left out where there is none."""
    names = [sys.executable] if sys.version_info[:2] in _OLD_PYTHONS else []
    names += [f"python{major}.{minor}" for major, minor in _OLD_PYTHONS]
    for name in filter(None, map(shutil.which, names)):
        if subprocess.run([name, "-c", "import venv"], capture_output=True).returncode == 0:
            return name
    pytest.skip(f"none of {', '.join(names)} is here")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_the_suite_passes_with_the_oldest_and_the_newest_versions_allowed(
    end: str, archives: dict[str, Path], tmp_path: Path
) -> None:
    """Of the newest what pip finds, of the oldest each lower bound; both with the tests that do the arithmetic."""
    python = python_of_the_oldest() if end == "oldest" else sys.executable
    oldest = lower_bounds(tmp_path, python)
    constraints = ["-c", oldest] if end == "oldest" else []
    extras = "[cpu,dev]" if sys.platform == "linux" else "[dev]"
    here = environment(tmp_path / "venv", *constraints, f"{archives['wheel']}{extras}", python=python) / "python"
    code = "import sys; from importlib.metadata import version; print(*(version(name) for name in sys.argv[1:]))"
    bounds = [line.split("==") for line in oldest.read_text().splitlines()]
    found = run(here, "-c", code, *(name for name, _ in bounds), cwd=tmp_path).split()
    for (name, bound), there in zip(bounds, found, strict=True):
        assert Version(there) == Version(bound) if end == "oldest" else Version(there) >= Version(bound), name
    # Without the package beside them, the tests have to take the installed one.
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    files = [f"tests/{name}.py" for name in _ARITHMETIC]
    said = run(here, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=tmp_path)
    assert " passed" in said.splitlines()[-1]

"""Training from Python: the names of the package, what `train` checks, and what it returns."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import orpo_mlx
from orpo_mlx import TrainingConfig, TrainingResult, UserError
from orpo_mlx.errors import ConfigError, TrainingError
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.train import train
from tests.helpers.kill_and_resume import records
from tests.training.checkpoints.test_resume import fail_before

QUIET = Reporter(Console(quiet=True))

_IMPORTS = [
    "from orpo_mlx import run_training; import orpo_mlx.train",
    "import orpo_mlx.train; from orpo_mlx import run_training",
]
_NAMES = """
import sys, types
import orpo_mlx
from orpo_mlx.train import train
assert isinstance(orpo_mlx.train, types.ModuleType) and orpo_mlx.train is sys.modules["orpo_mlx.train"]
assert run_training is train is orpo_mlx.run_training and not callable(orpo_mlx.train)
for name in [name for name in sys.modules if name.partition(".")[0] == "orpo_mlx"]:
    del sys.modules[name]
"""


def test_the_module_and_the_function_have_names_of_their_own_in_any_order_of_imports() -> None:
    # One process after the other would import mlx-lm anew. A BLAS is chosen before MLX is there, which it is by then.
    code = "".join(imports + _NAMES for imports in _IMPORTS)
    environment = {**os.environ, "ORPO_MLX_BLAS": "off"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_imports_no_more_than_it_must() -> None:
    code = "import sys, orpo_mlx; print([n for n in ('mlx.nn', 'mlx_lm', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(orpo_mlx.__all__) <= set(dir(orpo_mlx))
    assert all(getattr(orpo_mlx, name) is not None for name in orpo_mlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        orpo_mlx.trian  # noqa: B018


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"batch_size": 0}, "TrainingConfig: batch_size: found 0, expected a whole number greater than 0."),
        ({"batch_size": None}, "TrainingConfig: batch_size: found None; leave it out"),
        ({"learning_rate": "fast"}, "TrainingConfig: learning_rate: found 'fast'"),
        ({"memory": "thirft"}, "TrainingConfig: memory: found 'thirft'.*did you mean thrift"),
        ({"shuffle": 1}, "TrainingConfig: shuffle: found 1, expected true or false"),
        ({"model": Path("model")}, r"TrainingConfig: model: found .*Path\('model'\), expected text"),
        ({"method": "orop"}, "did you mean orpo"),
        ({"method": "sft", "beta": 0.5}, "beta.*: method sft has no such parameter"),
        ({"iters": 5, "epochs": 1.0}, "`iters` and `epochs` both say how long to train"),
        ({"lora_parameters": {"alpha": 16}}, "lora_parameters.alpha: unknown key"),
        ({"sample_every": 5, "samples": 0}, "`sample_every`: `samples=0` leaves no prompt to answer"),
    ],
)
def test_a_config_made_in_python_is_checked_as_flags_are(
    values: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        train(TrainingConfig(**values))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_config_is_named() -> None:
    with pytest.raises(ConfigError, match="config: found dict, expected a TrainingConfig"):
        train({"method": "dpo"})  # type: ignore[arg-type]


def test_what_follows_from_a_setting_follows_in_python_too(settings: dict[str, Any]) -> None:
    train(TrainingConfig(**settings | {"iters": 1, "grad_checkpoint": True, "lora_parameters": {"rank": 2}}), QUIET)
    text = (Path(settings["adapter_path"]) / "run.json").read_text()
    assert '"memory": "thrift"' in text
    assert '"rank": 2' in text
    assert '"scale": 20.0' in text


def test_the_result_is_what_the_run_wrote(settings: dict[str, Any], data: Path) -> None:
    config = TrainingConfig(**settings | {"method": "dpo", "save_best": True})
    result = train(config, QUIET)
    folder = Path(settings["adapter_path"])
    rows = records(folder)
    written = {split: {row["step"]: row for row in rows if row["split"] == split} for split in ("valid", "test")}
    assert isinstance(result, TrainingResult)
    assert (result.adapter_path, result.steps, result.skipped) == (folder, 3, 0)
    for split in ("valid", "test"):
        assert result.before[split].items() <= written[split][0].items()
        assert result.after[split].items() <= written[split][3].items()
    best = min(written["valid"], key=lambda step: float("inf") if step == 0 else written["valid"][step]["loss"])
    assert result.best == (best, written["valid"][best]["loss"], None)
    # Three steps of two of the six pairs: an epoch.
    ids = [
        len(row[key])
        for row in map(eval, (data / "train.jsonl").read_text().splitlines())
        for key in ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
    ]
    assert result.trained_tokens == sum(ids)
    reports = [row for row in rows if row["split"] == "train"]
    assert result.peak_memory_gib >= max(row["peak_memory_gib"] for row in reports) > 0
    assert result.training_seconds > 0
    speeds = [row["pair_tokens_per_s"] for row in reports]
    assert min(speeds) <= result.trained_tokens / result.training_seconds <= max(speeds)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.steps = 4  # type: ignore[misc]


def test_the_result_of_a_resumed_run_is_of_all_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = train(TrainingConfig(**settings | {"adapter_path": str(tmp_path / "whole")}), QUIET)
    config = TrainingConfig(**settings)
    with pytest.MonkeyPatch.context() as patch:
        fail_before(3, patch)
        with pytest.raises(TrainingError, match="step 2 is saved"):
            train(config, QUIET)
    resumed = train(dataclasses.replace(config, resume=True), QUIET)
    for name in ("steps", "before", "after", "trained_tokens"):
        assert getattr(resumed, name) == getattr(whole, name), name


def test_errors_of_the_package_are_user_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        train(TrainingConfig(**settings | {"data": "nowhere"}), QUIET)

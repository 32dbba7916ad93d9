"""`--test`: the figures of the run that made the adapters, and nothing trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import orpo_mlx
from orpo_mlx.cli.train import main
from orpo_mlx.config.flags import flag_of
from orpo_mlx.config.settings import TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from tests.conftest import make_model, make_pairs, write_id_rows
from tests.helpers.quiet_training import run_quietly


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora", "full"])
@pytest.mark.parametrize("method", ["orpo", "dpo", "bco"])
def test_the_figures_are_those_the_run_closed_with(
    settings: dict[str, Any], method: str, fine_tune_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"method": method, "fine_tune_type": fine_tune_type, "beta": 0.3}
    if fine_tune_type != "full":
        settings["lora_parameters"] = {"rank": 2}
    closed = run_quietly({**settings, "learning_rate": 1e-2})
    folder = Path(settings["adapter_path"])
    before = contents(folder)
    # The settings are those of the run.
    assert main(["--test", "--adapter-path", str(folder)]) == 0
    rows = lines_of(folder / "test_metrics.jsonl")
    assert [(row.pop("split"), row.pop("step")) for row in rows] == [("valid", 3), ("test", 3)]
    for found, split in zip(rows, ("valid", "test"), strict=True):
        assert found == pytest.approx(closed[split], rel=1e-6, abs=1e-9)
    after = contents(folder)
    assert after.pop(folder / "test_metrics.jsonl")
    assert after == before
    out = capsys.readouterr().out
    assert "Held-out pairs " in out
    assert "before" not in out


OTHERWISE = {
    **{"iters": 7, "grad_accumulation_steps": 3, "learning_rate": 0.5, "optimizer": "sgd", "lora_plus_ratio": 7.0},
    **{"patience": 7, "max_grad_norm": 7.0, "on_nonfinite": "skip", "precompute_reference": True, "shuffle": False},
    **{"seed": 7, "memory_check": False, "rank_timeout": 7.0, "steps_per_report": 7, "steps_per_eval": 7},
    **{"save_every": 7, "save_minutes": 7.0, "keep": 7, "keep_awake": False, "save_best": True, "samples": 7},
    **{"sample_tokens": 7, "report": False},
}
"""Settings that are about training, and one of each kind of those that go together."""

PACKAGE = Path(orpo_mlx.__file__).parent
CHECKING = ("settings.py", "command_line.py", "checks.py", "reference_checks.py")


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_flags_about_training_are_refused_and_in_a_file_change_nothing(
    settings: dict[str, Any], method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quietly({**settings, "method": method, "learning_rate": 1e-2})
    words = ["--test", "--adapter-path", settings["adapter_path"]]
    figures = []
    (tmp_path / "file.yaml").write_text(json.dumps(OTHERWISE))
    for more in ([], ["-c", str(tmp_path / "file.yaml")]):
        assert main([*words, *more]) == 0
        figures.append(lines_of(Path(settings["adapter_path"]) / "test_metrics.jsonl"))
    assert figures[0] == figures[1]
    for name, value in OTHERWISE.items():
        capsys.readouterr()
        flag = flag_of(name, str(value))
        assert main([*words, *flag.split()]) == 2
        assert f"error: {flag}: is about training, and --test trains nothing; leave" in capsys.readouterr().err


def test_no_setting_counts_beside_test_that_is_never_read(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_quietly({**settings, "method": "dpo"})
    read: set[str] = set()
    plain = object.__getattribute__

    def reading(config: TrainingConfig, name: str) -> Any:
        caller = Path(sys._getframe(1).f_code.co_filename)
        # Not of who checks all settings, or writes them down.
        if caller.is_relative_to(PACKAGE) and caller.name not in CHECKING:
            read.add(name)
        return plain(config, name)

    monkeypatch.setattr(TrainingConfig, "__getattribute__", reading)
    assert main(["--test", "--adapter-path", settings["adapter_path"]]) == 0
    # The last is read where it becomes a mode of memory.
    assert set(settings_with(Trait.EVALUATED | Trait.TESTED)) - read == {"grad_checkpoint"}


def test_an_adapter_file_and_other_data(settings: dict[str, Any], tmp_path: Path, data: Path) -> None:
    run_quietly({**settings, "learning_rate": 1e-2})
    trained = Path(settings["adapter_path"]) / "adapters.safetensors"
    words = ["--test", "--resume-adapter-file", str(trained), "--adapter-path", str(tmp_path / "figures")]
    write_id_rows(tmp_path / "more.jsonl", make_pairs(5, seed=7))
    figures = []
    (tmp_path / "only").mkdir()
    shutil.copy(tmp_path / "more.jsonl", tmp_path / "only" / "test.jsonl")
    for where in ("more.jsonl", "only"):
        assert main([*words, "--data", str(tmp_path / where)]) == 0
        (row,) = lines_of(tmp_path / "figures" / "test_metrics.jsonl")
        assert row["split"] == "test"
        figures.append(row)
    assert figures[0] == figures[1]
    # A run on the very pairs it is then tested on has other figures than the one before.
    assert main(words) == 0
    assert [row["split"] for row in lines_of(tmp_path / "figures" / "test_metrics.jsonl")] == ["valid", "test"]


def test_adapters_that_mlx_lm_made(settings: dict[str, Any], tmp_path: Path) -> None:
    """What mlx_lm.lora leaves: adapters.safetensors, and adapter_config.json with all its settings."""
    model = make_model()
    lora = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.v_proj"]}
    mx.random.seed(3)
    linear_to_lora_layers(model, 1, lora)
    weights = {
        name: mx.random.normal(value.shape) for name, value in dict(tree_flatten(model.trainable_parameters())).items()
    }
    folder = tmp_path / "theirs"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "model": settings["model"],
        "train": True,
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": lora,
        "data": "nowhere",
        "optimizer": "adam",
        "config": None,
        "mask_prompt": False,
        "iters": 1000,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    words = ["--adapter-path", str(folder), "--data", settings["data"]]
    assert main(["--test", *words]) == 0
    tested = {row["split"]: row for row in lines_of(folder / "test_metrics.jsonl")}
    assert tested["test"]["step"] == 0
    # A run that starts from the same adapters measures the same before its first step.
    lora_settings = {"num_layers": 1, "lora_parameters": lora, "resume_adapter_file": str(folder)}
    run_quietly({**settings, **lora_settings, "iters": 1})
    started = [row for row in lines_of(Path(settings["adapter_path"]) / "metrics.jsonl") if row["step"] == 0]
    assert len(started) == 2
    for row in started:
        split = row.pop("split")
        assert tested[split].pop("split") == split
        assert tested[split] == pytest.approx(row, rel=1e-6)


def test_the_reference_of_a_run_that_started_from_an_adapter_is_not_guessed(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quietly({**settings, "adapter_path": str(tmp_path / "first")})
    run_quietly({**settings, "method": "dpo", "resume_adapter_file": str(tmp_path / "first")})
    assert main(["--test", "--adapter-path", settings["adapter_path"]]) == 0
    expected = (
        f"The reference here is the model without adapters; the run that made these started from {tmp_path}/first."
    )
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--adapter-path", "nowhere"], "--test: no adapters in nowhere; give the folder of a run"),
        (["--resume-adapter-file", "nowhere"], "--test: no adapters in nowhere; give the folder of a run"),
        (["--val-batches", "0", "--test-batches", "0"], "--test: --val-batches 0 and --test-batches 0 leave nothing"),
        (["--num-layers", "1"], "does not fit this model's adapters"),
        (["--data", "nowhere"], "nowhere: no such file or folder; expected a folder with a test split"),
        (["--resume"], "leave out --resume"),
    ],
)
def test_what_cannot_be_tested(
    run_of_three_steps: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--test", "--adapter-path", str(run_of_three_steps), *words]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.json", "{", "run.json: cannot be read as JSON"),
        ("run.json", "[]", "run.json: holds a list, expected a table"),
        ("run.json", '{"settings": 5}', "run.json: settings: found 5, expected a table"),
        ("run.json", '{"settings": {"batch_size": "x"}}', "run.json: batch_size: found 'x'"),
        ("adapter_config.json", '{"num_layers": "x"}', "adapter_config.json: num_layers: found 'x'"),
    ],
)
def test_damaged_records(
    run_of_three_steps: Path,
    model_folder: Path,
    name: str,
    text: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run_of_three_steps
    if name == "adapter_config.json":
        (folder / "run.json").unlink()
    (folder / name).write_text(text)
    assert main(["--test", "--adapter-path", str(folder), "--model", str(model_folder)]) == 2
    assert expected in capsys.readouterr().err


def test_interrupted_it_says_so(
    run_of_three_steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orpo_mlx.training.evaluating.evaluation.evaluate", interrupt)
    assert main(["--test", "--adapter-path", str(run_of_three_steps)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_checkpoint_is_tested_with_its_runs_settings(settings: dict[str, Any]) -> None:
    changes = {"method": "dpo", "beta": 0.7, "save_every": 1, "keep": 9, "save_best": True, "learning_rate": 1e-2}
    closed = run_quietly({**settings, **changes})
    folder = Path(settings["adapter_path"])
    (last,) = (folder / "checkpoints").glob("step-0000003")
    assert main(["--test", "--adapter-path", str(last), "--data", settings["data"]]) == 0
    found = {row.pop("split"): row for row in lines_of(last / "test_metrics.jsonl")}
    for split in ("valid", "test"):
        assert found[split].pop("step") == 3
        assert found[split] == pytest.approx(closed[split], rel=1e-6, abs=1e-9)

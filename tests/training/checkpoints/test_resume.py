"""A resumed run is the run it would have been, bit for bit; what is not whole, or not the same run, is not resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.errors import ConfigError, TrainingError
from orpo_mlx.files import copy_if_different
from orpo_mlx.training.checkpoints.folders import CheckpointFolder
from orpo_mlx.training.checkpoints.progress import Best
from orpo_mlx.training.checkpoints.random_numbers import random_state, set_random_state
from orpo_mlx.training.checkpoints.save import mark_best
from orpo_mlx.training.checkpoints.state import read_state
from orpo_mlx.training.loop import Loop
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from tests.conftest import make_pairs, write_id_rows, write_model_folder
from tests.helpers.kill_and_resume import adapters, kill_and_resume, metrics, records, signal_and_resume
from tests.helpers.quiet_training import flags, run_quietly

SLOW = partial(pytest.param, marks=pytest.mark.slow)
LONG = {"iters": 9, "save_every": 2, "steps_per_report": 2, "steps_per_eval": 4, "val_batches": 1}


def fail_before(step: int, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    """Let the step of that number raise, before anything of it is done."""

    def failing(run: Run, pairs: Any, number: int) -> Any:
        if number == step:
            raise error or RuntimeError("the power is out")
        return optimiser_step(run, pairs, number)

    monkeypatch.setattr("orpo_mlx.training.loop.optimiser_step", failing)


def whole_and_resumed(
    settings: dict[str, Any], tmp_path: Path, stops: list[int], between: Callable[[Path], None] = lambda folder: None
) -> tuple[Path, Path]:
    """The folders of an uninterrupted run and of one that broke before each step of `stops`."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_quietly({**settings, "adapter_path": str(whole)})
    changes: dict[str, Any] = {}
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            fail_before(stop, patch)
            with pytest.raises(TrainingError, match=f"step {stop}: the power is out; step {stop - 1} is saved"):
                run_quietly({**settings, "adapter_path": str(broken), **changes})
        between(broken)
        changes = {"resume": True}
    run_quietly({**settings, "adapter_path": str(broken), **changes})
    return whole, broken


def assert_same(whole: Path, resumed: Path) -> None:
    first, second = adapters(whole), adapters(resumed)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert metrics(whole) == metrics(resumed)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "orpo", "lora_parameters": {"dropout": 0.1}, "save_best": True},
        {"method": "dpo", "lora_parameters": {"dropout": 0.1}, "grad_accumulation_steps": 2, "max_grad_norm": 0.5},
        {"method": "dpo", "fine_tune_type": "full", "optimizer": "muon"},
        {"method": "ld_dpo", "sync_reference": "0.5,2"},
        SLOW({"method": "aot", "optimizer": "adafactor", "micro_batch_tokens": 30, "memory": "thrift"}),
        SLOW({"method": "orpo", "optimizer": "sgd", "fine_tune_type": "dora", "shuffle": False}),
        SLOW({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 9], "warmup": 3}}),
    ],
    ids=["orpo", "dpo", "full", "synced", "aot", "sgd", "schedule"],
)
def test_a_resumed_run_is_the_run_it_would_have_been(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    def forget(_: Path) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    # One in the middle of a report, one right after a save, one right after an evaluation.
    assert_same(*whole_and_resumed({**settings, **LONG, **changes}, tmp_path, [4, 7, 9], forget))


@pytest.mark.parametrize(
    ("method", "runs"), [("orpo", 2), *(pytest.param(each, 5, marks=pytest.mark.slow) for each in ("orpo", "dpo"))]
)
def test_killed_at_random_and_resumed_until_done(
    settings: dict[str, Any], tmp_path: Path, method: str, runs: int
) -> None:
    settings |= {**LONG, "method": method, "lora_parameters": {"dropout": 0.1}}
    outcome = kill_and_resume(settings, tmp_path, runs=runs, seed=7)
    assert outcome.equal == outcome.runs
    assert outcome.kills >= outcome.runs


@pytest.mark.slow
def test_signalled_at_any_moment_and_resumed(settings: dict[str, Any], tmp_path: Path) -> None:
    ends = signal_and_resume({**settings, **LONG, "lora_parameters": {"dropout": 0.1}}, tmp_path, runs=8, seed=5)
    assert ends.faults == []
    assert ends.equal == ends.runs


def test_random_numbers_go_on_where_they_were() -> None:
    mx.random.seed(123456789012345)
    mx.random.uniform(shape=(3,))
    state = random_state()
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(5)
    set_random_state(state)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected).item()


def interrupted(settings: dict[str, Any], before: int = 6) -> Path:
    """The folder of a run that ended before a step."""
    with pytest.MonkeyPatch.context() as patch:
        fail_before(before, patch)
        with pytest.raises(TrainingError):
            run_quietly(settings)
    return Path(settings["adapter_path"])


def test_resume_needs_no_other_flag_and_a_longer_run_goes_on(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted({**settings, **LONG, "beta": 0.3, "samples": 0})
    argv = ["--resume", "--adapter-path", str(folder)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert f"Goes on from step 5: {folder}/checkpoints/step-0000005." in out
    assert "(beta 0.3)" in out
    assert "Held-out pairs, before and after training" in out
    assert json.loads((folder / "run.json").read_text())["resumed_at"] == [5]
    assert main([*argv, "--iters", "12"]) == 0
    assert "Changed since the checkpoint: --iters 9 is now 12." in capsys.readouterr().out
    assert [row["step"] for row in records(folder) if row["split"] == "test"] == [0, 12]
    assert json.loads((folder / "run.json").read_text())["resumed_at"] == [5, 9]


def test_steps_that_are_taken_are_not_taken_back(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted({**settings, **LONG})
    before = (folder / "metrics.jsonl").read_bytes()
    argv = ["--resume", "--adapter-path", str(folder), "--iters"]
    assert main([*argv, "4"]) == 2
    assert (
        "5 steps are taken already, and the settings end the run after 4; give --iters 5 or" in capsys.readouterr().err
    )
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert main([*argv, "5"]) == 0
    assert "Held-out pairs, before and after training" in capsys.readouterr().out


def test_resume_with_nothing_saved_starts_from_the_beginning(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(settings), "--resume"]) == 0
    assert "holds no checkpoint yet: the run starts from the beginning." in capsys.readouterr().out


CHANGES = {
    "--learning-rate 0.5": "--learning-rate 0.001 is now 0.5",
    "--batch-size 3": "--batch-size 2 is now 3",
    "--method cpo --beta 0.2": "--method orpo is now cpo; --beta None is now 0.2",
    "--max-grad-norm 3": "--max-grad-norm None is now 3.0",
    "--seed 4": "--seed 0 is now 4",
    "--optimizer sgd": "--optimizer adamw is now sgd",
}


def test_changes_to_the_maths_are_listed_and_refused(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted({**settings, **LONG})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.lock"}
    argv = ["--resume", "--adapter-path", str(folder)]
    for change, expected in CHANGES.items():
        assert main([*argv, *change.split()]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "this is not the run that was saved at step 5" in err
        for part in expected.split("; "):
            assert part in err
    assert {path: path.read_bytes() for path in before} == before
    assert main([*argv, "--optimizer", "sgd", "--resume-with-changes"]) == 0
    out = capsys.readouterr().out
    assert f"Changed since the checkpoint: {CHANGES['--optimizer sgd']}." in out
    assert "The optimiser is another one: it begins anew." in out


def test_other_rows_or_another_model_are_refused(
    settings: dict[str, Any], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted({**settings, **LONG})
    argv = ["--resume", "--adapter-path", str(folder)]
    kept = (data / "valid.jsonl").read_text()
    write_id_rows(data / "valid.jsonl", make_pairs(6, seed=9))
    assert main(argv) == 2
    assert "--data: other rows in valid" in capsys.readouterr().err
    (data / "valid.jsonl").write_text(kept)
    # The same rows under another name are the same rows.
    shutil.copytree(data, data.parent / "moved")
    model = data.parent / "model"
    shutil.copytree(settings["model"], model)
    assert main([*argv, "--data", str(data.parent / "moved"), "--model", str(model)]) == 0
    capsys.readouterr()
    weights = mx.load(str(model / "model.safetensors"))
    assert isinstance(weights, dict)
    name = next(iter(weights))
    changed = {**weights, name: weights[name] + 1}
    mx.eval(changed)
    mx.save_safetensors(str(model / "model.safetensors"), changed)
    assert main([*argv, "--model", str(model)]) == 2
    assert "--model: other weights" in capsys.readouterr().err


def test_an_unfinished_run_is_not_written_over_by_mistake(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted({**settings, **LONG})
    assert main(flags({**settings, **LONG})) == 2
    assert f"{folder}: holds a run that ended at step 5 of 9; --resume goes on" in capsys.readouterr().err
    assert main([*flags({**settings, **LONG, "iters": 2}), "--overwrite"]) == 0
    # Nothing of the earlier run can be taken for a checkpoint of this one.
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-0000002"]
    assert [row["step"] for row in records(folder)] == [0, 2, 0, 2, 2]
    assert main(flags({**settings, **LONG})) == 0


def test_a_checkpoint_never_lets_remote_code_run_or_opens_a_port(settings: dict[str, Any]) -> None:
    from orpo_mlx.training.checkpoints.resume import settings_to_resume

    folder = interrupted({**settings, **LONG, "trust_remote_code": True, "watch": 0})
    taken = settings_to_resume(str(folder))
    assert taken["learning_rate"] == 1e-3
    assert not {"trust_remote_code", "resume", "adapter_path", "watch"} & set(taken)


@pytest.mark.parametrize("start", [SLOW("full"), "warm"])
def test_a_reference_that_is_gone_from_memory_and_disk_is_in_the_checkpoint(
    settings: dict[str, Any], tmp_path: Path, start: str
) -> None:
    settings |= {**LONG, "method": "dpo"}
    if start == "full":
        settings["fine_tune_type"] = "full"
    else:
        run_quietly({**settings, "adapter_path": str(tmp_path / "first"), "learning_rate": 0.01})
        settings["resume_adapter_file"] = str(tmp_path / "first")

    def forget(_: Path) -> None:
        shutil.rmtree(tmp_path / "cache")
        shutil.rmtree(tmp_path / "first", ignore_errors=True)

    assert_same(*whole_and_resumed(settings, tmp_path, [6], forget))


def kept_rows(cache: Path) -> dict[str, dict[bytes, Any]]:
    """The log-probs in each file of the reference cache."""
    found = {}
    for path in (cache / "reference").glob("*.npz"):
        with np.load(path) as arrays:
            found[path.name] = dict(zip(arrays["keys"].tolist(), arrays["logps"], strict=True))
    return found


@pytest.mark.parametrize("change", ["model", "reference"])
def test_rows_of_another_reference_are_not_taken_for_this_ones(
    settings: dict[str, Any], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    other = write_model_folder(tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.save_safetensors(str(other / "model.safetensors"), {name: 1.1 * array for name, array in weights.items()})
    settings |= {**LONG, "method": "dpo"}
    interrupted(settings)
    before = set(kept_rows(own_cache))
    changes = {change: str(other)}
    run_quietly({**settings, **changes, "resume": True, "resume_with_changes": True})
    monkeypatch.setenv("ORPO_MLX_CACHE", str(tmp_path / "fresh"))
    run_quietly({**settings, **changes, "adapter_path": str(tmp_path / "fresh adapters")})
    ((name, fresh),) = kept_rows(tmp_path / "fresh").items()
    found = kept_rows(own_cache)[name]
    assert name not in before
    assert found
    for key, row in found.items():
        np.testing.assert_allclose(row, fresh[key], rtol=1e-4)


@pytest.mark.parametrize("maths", [1, 2])
def test_rows_of_other_maths_stay_out_of_the_cache(
    settings: dict[str, Any], own_cache: Path, monkeypatch: pytest.MonkeyPatch, maths: int
) -> None:
    settings |= {**LONG, "method": "dpo"}
    interrupted(settings)
    shutil.rmtree(own_cache)
    monkeypatch.setattr("orpo_mlx.training.references.reference._MATHS", maths)
    run_quietly({**settings, "resume": True, "iters": 12})
    assert len(kept_rows(own_cache)) == (maths == 1)


def test_the_metrics_file_must_be_the_runs_own(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted({**settings, **LONG})
    path = folder / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace("loss", "moss", 1))
    with pytest.raises(TrainingError, match=r"metrics.jsonl: its first \d+ bytes are not those"):
        run_quietly({**settings, **LONG, "resume": True})
    path.unlink()
    run_quietly({**settings, **LONG, "resume": True})
    assert [row["step"] for row in records(folder) if row["split"] == "train"] == [6, 8, 9]


def test_adapter_folders_of_checkpoints_are_taken_by_mlx_lm_and_the_best_is_kept(settings: dict[str, Any]) -> None:
    from mlx_lm import load as mlx_lm_load

    settings |= {"iters": 12, "save_every": 3, "steps_per_eval": 2, "keep": 1, "save_best": True}
    run_quietly({**settings, "learning_rate": 0.3})
    folder = Path(settings["adapter_path"])
    losses = {row["step"]: row["loss"] for row in records(folder) if row["split"] == "valid" and row["step"]}
    best = min(losses, key=losses.__getitem__)
    assert best < 12, losses
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{best:07d}", "step-0000012"]
    assert (folder / "best").resolve().name == f"step-{best:07d}"
    mlx_lm_load(settings["model"], adapter_path=str(folder / "best"))
    assert (folder / "adapters.safetensors").read_bytes() == (
        folder / "checkpoints" / "step-0000012" / "adapters.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("knows", [True, False])
def test_the_best_of_a_run_that_is_made_longer_is_kept(settings: dict[str, Any], knows: bool) -> None:
    settings |= {"iters": 4, "steps_per_eval": 4, "keep": 1, "save_best": True}
    folder, best = Path(settings["adapter_path"]), "step-0000004"
    with pytest.MonkeyPatch.context() as patch:
        if not knows:  # As earlier versions have left it: there is the link, and the state knows nothing.
            patch.setattr(Loop, "_note_best", lambda self, found: mark_best(self.run, found.step))
        run_quietly(settings)
    state = read_state(CheckpointFolder(folder / "checkpoints" / best, 4))
    assert state.progress.best == (Best(4, records(folder)[-2]["loss"]) if knows else None)
    # It ends before it is evaluated again.
    interrupted({**settings, "resume": True, "iters": 9, "save_every": 1, "steps_per_eval": 100})
    assert (folder / "best").resolve().name == best
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [best, "step-0000005"]


def test_saving_the_best_again_leaves_no_line_out(settings: dict[str, Any]) -> None:
    settings |= {"iters": 4, "save_best": True}
    run_quietly(settings)
    folder = Path(settings["adapter_path"])
    before = metrics(folder)
    assert [(row["step"], row["split"]) for row in before if row["split"] == "test"] == [(0, "test"), (4, "test")]
    run_quietly({**settings, "resume": True})
    assert metrics(folder) == before


@pytest.mark.parametrize("left", ["older", "missing"])
def test_adapters_that_a_killed_save_did_not_reach_are_put_beside_the_checkpoint(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    settings |= LONG if left == "older" else {**LONG, "save_every": 100}
    folder = Path(settings["adapter_path"])

    def full(source: Path, path: Path) -> None:
        if "0000009" in str(source):
            raise OSError(28, "No space left on device", str(path))
        copy_if_different(source, path)

    with monkeypatch.context() as patch:
        patch.setattr("orpo_mlx.training.checkpoints.save.copy_if_different", full)
        said = r"adapters.safetensors: cannot be saved \(No space left on device\); step 9 is saved, go on with"
        with pytest.raises(TrainingError, match=said):
            run_quietly(settings)
    assert (folder / "adapters.safetensors").exists() == (left == "older")
    run_quietly({**settings, "resume": True})
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (folder / "checkpoints" / "step-0000009" / name).read_bytes()


@pytest.mark.parametrize("changes", [{"val_batches": 0}, {"data": "train.jsonl"}])
def test_the_best_needs_a_validation(settings: dict[str, Any], data: Path, changes: dict[str, Any]) -> None:
    if "data" in changes:
        changes["data"] = str(data / "train.jsonl")
    with pytest.raises(ConfigError, match="`save_best` goes by the validation loss"):
        run_quietly({**settings, "save_best": True, **changes})


def test_two_processes_on_one_adapter_path(settings: dict[str, Any]) -> None:
    code = (
        "import sys; from pathlib import Path; from orpo_mlx.folder_lock import locked\n"
        f"with locked(Path({settings['adapter_path']!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    Path(settings["adapter_path"]).mkdir()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(TrainingError, match=f"process {other.pid} is training into it"):
            run_quietly(settings)
        other.kill()
    run_quietly(settings)


def test_a_clock_that_goes_backwards_changes_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import time

    def age(folder: Path) -> None:
        """The newest step gets the oldest date."""
        for number, path in enumerate(sorted((folder / "checkpoints").iterdir())):
            os.utime(path, (1e9 - number, 1e9 - number))

    clock = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr("orpo_mlx.training.loop.time.perf_counter", lambda: float(next(clock)))
    whole, resumed = whole_and_resumed({**settings, **LONG}, tmp_path, [6], age)
    assert_same(whole, resumed)


def test_what_was_half_applied_is_not_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= LONG
    whole = tmp_path / "whole"
    run_quietly({**settings, "adapter_path": str(whole)})

    def step(run: Run, pairs: Any, number: int) -> Any:
        if number == 6:
            # The step's own: the optimiser's may be in a trace already.
            update = run.functions.update

            def broken(*arguments: Any) -> None:
                update(*arguments)
                raise RuntimeError("[METAL] out of memory")

            run.functions.update = broken  # type: ignore[method-assign, assignment]
        return optimiser_step(run, pairs, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orpo_mlx.training.loop.optimiser_step", step)
        with pytest.raises(
            TrainingError, match=r"step 6: .*out of memory, while the step was applied; .*; step 4 is saved"
        ):
            run_quietly(settings)
    run_quietly({**settings, "resume": True})
    assert_same(whole, Path(settings["adapter_path"]))

"""A run that has no whole checkpoint: before its first one, with a damaged one, or whose folder is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.errors import TrainingError
from orpo_mlx.files import save_safetensors
from orpo_mlx.training.checkpoints.folders import CheckpointFolder, defect
from orpo_mlx.training.checkpoints.resume import find_checkpoint
from orpo_mlx.training.evaluating.evaluation import evaluate_splits
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from tests.helpers.kill_and_resume import adapters
from tests.helpers.quiet_training import flags, run_quietly
from tests.training.checkpoints.test_resume import LONG, assert_same, fail_before, interrupted


def began(settings: dict[str, Any], folder: Path) -> None:
    """A run that ends before its first step, in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        fail_before(1, patch)
        with pytest.raises(TrainingError, match="nothing was saved"):
            run_quietly({**settings, "adapter_path": str(folder)})


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_as_what_it_was(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, whole, broken = (tmp_path / name for name in ("first", "whole", "broken"))
    run_quietly({**settings, "adapter_path": str(first)})
    settings |= {"method": "dpo", "resume_adapter_file": str(first), "seed": 5, "beta": 0.3}
    run_quietly({**settings, "adapter_path": str(whole)})
    began(settings, broken)
    argv = ["--resume", "--adapter-path", str(broken)]
    before = (broken / "run.json").read_bytes()
    # Another run is not begun in its place.
    assert main([*argv, "--beta", "0.2"]) == 2
    assert "not the run that was begun there and never saved (--beta 0.3 is now 0.2)" in capsys.readouterr().err
    assert (broken / "run.json").read_bytes() == before
    assert main(argv) == 0
    assert "holds no checkpoint yet: the run starts from the beginning." in capsys.readouterr().out
    assert_same(whole, broken)


def test_what_is_no_run_is_not_resumed(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapters"
    argv = ["--resume", "--adapter-path", str(folder)]
    # Nothing there, and nothing said of what to train.
    assert main([*argv, "--iters", "2"]) == 2
    assert f"--resume: {folder} holds no run to go on with" in capsys.readouterr().err
    assert not folder.exists()
    began(settings, folder)
    for text in ("{", "[]", "{}", '{"settings": 3}', '{"settings": {}, "data": {"train": 1}}'):
        (folder / "run.json").write_text(text)
        assert main(argv) == 2, text
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert len(err) < 400
    # Adapters whose checkpoints were removed are not trained over.
    run_quietly({**settings, "overwrite": True})
    shutil.rmtree(folder / "checkpoints")
    assert main(argv) == 2
    assert "holds adapters and no checkpoint to go on from" in capsys.readouterr().err
    # Those of an earlier run that this one had begun to overwrite are.
    began(settings, folder)
    assert main(argv) == 0


def test_a_damaged_only_checkpoint_is_said_to_be_damaged(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted({**settings, **LONG, "keep": 1})
    (folder / "checkpoints" / "step-0000005" / "state.json").write_text("{}")
    before = (folder / "run.json").read_bytes()
    assert main(["--resume", "--adapter-path", str(folder)]) == 2
    assert "no checkpoint in" in (err := capsys.readouterr().err)
    assert "state.json has 2 bytes" in err
    assert main(flags({**settings, **LONG})) == 2
    assert "holds a run whose checkpoints are damaged" in capsys.readouterr().err
    assert (folder / "run.json").read_bytes() == before


def test_the_checkpoint_that_a_damaged_one_was_to_replace_is_gone_on_from(settings: dict[str, Any]) -> None:
    folder = interrupted({**settings, **LONG, "keep": 1})
    checkpoint = folder / "checkpoints" / "step-0000005"
    shutil.copytree(checkpoint, checkpoint.with_name("step-0000005.replaced"))
    (checkpoint / "state.json").write_text("{}")
    found, problems = find_checkpoint(folder)
    assert found == CheckpointFolder(checkpoint, 5)
    assert "state.json has 2 bytes" in problems[0]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-0000005"]
    assert defect(checkpoint, 5) is None


def test_what_a_killed_save_has_left_is_cleared(settings: dict[str, Any]) -> None:
    folder = Path(settings["adapter_path"])
    folder.mkdir()
    left = folder / ".adapters.abcdefgh.safetensors"
    left.touch()
    run_quietly(settings)
    assert not left.exists()


def test_a_damaged_run_json_costs_a_date_and_not_the_run(settings: dict[str, Any]) -> None:
    folder = interrupted({**settings, **LONG})
    (folder / "run.json").write_text("{")
    run_quietly({**settings, **LONG, "resume": True})
    record = json.loads((folder / "run.json").read_text())
    assert (record["started"], record["resumed_at"]) == (None, [5])


@pytest.mark.parametrize("when", ["step", "evaluation"])
def test_a_folder_that_is_removed_during_the_run_is_made_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    settings |= {**LONG, "save_every": 100}
    whole, folder = tmp_path / "whole", Path(settings["adapter_path"])
    run_quietly({**settings, "adapter_path": str(whole)})

    def step(run: Run, pairs: Any, number: int) -> Any:
        if number == 6:
            shutil.rmtree(folder)
        return optimiser_step(run, pairs, number)

    def evaluation(run: Run, names: Any, **options: Any) -> Any:
        if options["step"] == 9:
            shutil.rmtree(folder)
        return evaluate_splits(run, names, **options)

    with monkeypatch.context() as patch:
        target = {"step": ("optimiser_step", step), "evaluation": ("evaluate_splits", evaluation)}[when]
        patch.setattr(f"orpo_mlx.training.loop.{target[0]}", target[1])
        with pytest.raises(
            TrainingError, match="was removed while the run went on, and was made again; step 9 is saved"
        ):
            run_quietly(settings)
    run_quietly({**settings, "resume": True})
    for name, array in adapters(whole).items():
        np.testing.assert_array_equal(array, adapters(folder)[name])


def test_a_full_disk_is_said_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings |= LONG

    def full(path: Path, arrays: Any, metadata: Any = None) -> None:
        if "0000004" in str(path):
            raise OSError(28, "No space left on device")
        save_safetensors(path, arrays, metadata)

    monkeypatch.setattr("orpo_mlx.training.checkpoints.save.save_safetensors", full)
    with pytest.raises(TrainingError) as caught:
        run_quietly(settings)
    assert str(caught.value).count("No space left on device") == 1
    assert "; step 2 is saved" in str(caught.value)


def test_a_slow_run_is_saved_by_the_clock(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    settings |= {**LONG, "save_every": 100, "keep": 9}
    run_quietly({**settings, "adapter_path": str(whole)})
    # Each look at the clock is three minutes after the one before: slow steps, or a Mac that slept.
    clock = iter(range(0, 10**6, 180))
    monkeypatch.setattr("orpo_mlx.training.loop.time.monotonic", lambda: float(next(clock)))
    run_quietly(settings)
    folder = Path(settings["adapter_path"])
    assert_same(whole, folder)
    assert [path.name[-2:] for path in sorted((folder / "checkpoints").iterdir())] == ["03", "07", "09"]
    run_quietly({**settings, "adapter_path": str(tmp_path / "off"), "save_minutes": 0.0})
    assert len(list((tmp_path / "off" / "checkpoints").iterdir())) == 1

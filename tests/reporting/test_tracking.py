"""What services are told, and that a TensorBoard has each step once however often a run was resumed."""

from __future__ import annotations

import shutil
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from orpo_mlx.cli.train import main
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import TrainingError
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.tracking import EventFiles
from orpo_mlx.train import train
from tests.helpers.kill_and_resume import records
from tests.helpers.quiet_training import flags
from tests.helpers.small_comparison import quiet
from tests.training.checkpoints.test_resume import fail_before

LONG = {"iters": 9, "save_every": 2, "steps_per_report": 2, "steps_per_eval": 4}


class Stand:
    """Stands in for the package of a service."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[dict[str, Any]] = []
        module = types.ModuleType(name)
        vars(module).update(init=self.init, log=self.log, finish=self.finish)
        monkeypatch.setitem(sys.modules, name, module)
        # mlx-lm has tried to import it already.
        monkeypatch.setattr(f"mlx_lm.tuner.callbacks.{name}", module)

    def init(self, **arguments: Any) -> None:
        self.begun.append(arguments)

    def log(self, data: dict[str, Any], step: int) -> None:
        self.logged.append((step, data))

    def finish(self, **arguments: Any) -> None:
        self.finished.append(arguments)


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_is_told_what_is_reported(
    settings: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(name, monkeypatch)
    settings |= {**LONG, "report_to": name, "project_name": "pairs"}
    train(make_config(settings), quiet())
    folder = Path(settings["adapter_path"])
    (begun,) = stand.begun
    assert begun["project"] == "pairs"
    assert begun["name" if name == "wandb" else "experiment_name"] == folder.name
    assert begun["config"]["learning_rate"] == 1e-3
    assert begun["config"]["method_parameters"] == {"orpo": {"beta": 0.1}}
    expected = [row for row in records(folder) if row["split"] != "test"]
    assert [step for step, _ in stand.logged] == [row["step"] for row in expected]
    for (step, data), row in zip(stand.logged, expected, strict=True):
        prefix, loss = ("val_", "val_loss") if row["split"] == "valid" else ("", "train_loss")
        assert data["iteration"] == step
        assert data[loss] == row["loss"]
        assert data[f"{prefix}rewards/margins"] == row["rewards/margins"]
    # Steps never go back: the services would drop them.
    steps = [step for step, _ in stand.logged]
    assert steps == sorted(steps)
    assert stand.finished == [{}]


def test_several_services_and_a_run_that_ends_early(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, swanlab = Stand("wandb", monkeypatch), Stand("swanlab", monkeypatch)
    settings |= {**LONG, "report_to": "wandb,swanlab"}
    with pytest.MonkeyPatch.context() as patch:
        fail_before(5, patch)
        with pytest.raises(TrainingError):
            train(make_config(settings), quiet())
    assert [step for step, _ in wandb.logged] == [step for step, _ in swanlab.logged] == [0, 2, 4, 4]
    assert wandb.finished == [{"exit_code": 1}]
    assert swanlab.finished[0]["state"] == "crashed"
    train(make_config({**settings, "resume": True}), quiet())
    assert [step for step, _ in wandb.logged[4:]] == [4, 6, 8, 8, 9, 9]


def test_a_service_whose_package_is_missing_is_a_sentence_before_anything_begins(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*flags(settings), "--report-to", "tensorboard,wandb"]) == 2
    out, err = capsys.readouterr()
    assert err == "orpo-mlx train: error: --report-to wandb: needs a package; pip install wandb.\n"
    assert out == ""
    assert not Path(settings["adapter_path"]).exists()


def test_a_service_that_does_not_begin_is_a_sentence_and_leaves_the_earlier_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(settings), quiet())
    stand = Stand("wandb", monkeypatch)

    def init(**_: Any) -> None:
        raise PermissionError("no API key configured,\nuse wandb login.")

    vars(sys.modules["wandb"])["init"] = init
    assert main([*flags(settings), "--report-to", "wandb"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--report-to wandb: does not begin (PermissionError: no API key configured, use wandb login);" in err
    assert (Path(settings["adapter_path"]) / "checkpoints" / "step-0000003").is_dir()
    assert stand.finished == []


def test_a_service_that_fails_in_the_middle_ends_the_run_saved_and_one_that_cannot_be_closed_does_no_harm(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Stand("wandb", monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as patch:
        patch.setitem(vars(sys.modules["wandb"]), "log", fail)
        assert main([*flags(settings), "--report-to", "wandb", "--val-batches", "0"]) == 2
    err = capsys.readouterr().err
    assert "step 1: --report-to wandb, on_train_loss_report: ConnectionError: the line is dead; step 1 is saved" in err
    vars(sys.modules["wandb"])["finish"] = fail
    train(make_config({**settings, "report_to": "wandb", "overwrite": True}), Reporter(Console(width=300)))
    assert "`report_to=wandb`: could not be closed (ConnectionError: the line is dead)." in capsys.readouterr().out


def events(path: Path) -> Iterator[Any]:
    """The events in a file: length, its checksum, content, its checksum."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = content[place + 12 : place + 12 + length]
        for start, part in ((place + 8, content[place : place + 8]), (place + 12 + length, event)):
            checksum = crc32c(part)
            masked = ((checksum >> 15 | checksum << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack_from("<I", content, start) == (masked,)
        place += 16 + length
        yield Event.FromString(event)


def shown(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """What TensorBoard shows of a folder: files in the order of their names; a session that starts at a step takes back
    all events from that step on."""
    found: list[tuple[int, dict[str, float]]] = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                found = [(step, values) for step, values in found if step < event.step]
            elif event.summary.value:
                found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return found


def assert_shown(folder: Path) -> None:
    """TensorBoard has the metrics of each step of `metrics.jsonl`, once."""
    for split in ("train", "valid"):
        rows = [row for row in records(folder) if row["split"] == split]
        found = shown(folder / "tensorboard" / split)
        assert [step for step, _ in found] == [row["step"] for row in rows], split
        for (step, values), row in zip(found, rows, strict=True):
            for key in ("loss", "rewards/accuracies", "rewards/chosen", "accuracies/mean_logps", "nll_loss"):
                assert values[key] == np.float32(row[key]), (split, step, key)


def test_tensorboard_has_every_report_and_starts_anew_with_a_new_run(settings: dict[str, Any]) -> None:
    settings |= {**LONG, "report_to": "tensorboard"}
    folder = Path(settings["adapter_path"])
    train(make_config(settings), quiet())
    assert_shown(folder)
    assert shown(folder / "tensorboard" / "train")[0][1].keys() >= {"tokens_per_second", "peak_memory", "learning_rate"}
    train(make_config({**settings, "iters": 3, "method": "dpo"}), quiet())
    assert_shown(folder)
    assert len(list((folder / "tensorboard").rglob("events*"))) == 2


@pytest.mark.parametrize("lost", [2, *(pytest.param(lost, marks=pytest.mark.slow) for lost in (0, 1))])
def test_tensorboard_of_a_resumed_run_has_each_step_once(settings: dict[str, Any], lost: int) -> None:
    settings |= {**LONG, "report_to": "tensorboard", "steps_per_report": 1, "steps_per_eval": 2}
    folder = Path(settings["adapter_path"])
    changes: dict[str, Any] = {}
    for stop in (6, 8):
        with pytest.MonkeyPatch.context() as patch:
            fail_before(stop, patch)
            with pytest.raises(TrainingError, match=f"step {stop - 1} is saved"):
                train(make_config({**settings, **changes}), quiet())
        # As if it had been killed: the newest checkpoints were not written, but what was reported was.
        for step in range(stop - lost, stop):
            shutil.rmtree(folder / "checkpoints" / f"step-{step:07d}", ignore_errors=True)
        changes = {"resume": True}
    train(make_config({**settings, **changes}), quiet())
    assert [row["step"] for row in records(folder) if row["split"] == "train"] == list(range(1, 10))
    assert_shown(folder)


def test_a_full_disk_is_an_error_at_once_and_not_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = EventFiles(tmp_path, None)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            files.on_val_loss_report({"iteration": 0, "val_time": 1.0, "val_loss": 2.0})
    files.close()

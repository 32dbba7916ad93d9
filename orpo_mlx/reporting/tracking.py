"""Runs reported to services: mlx-lm's callbacks for Weights & Biases and SwanLab, and TensorBoard's event files."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.tuner.callbacks import get_reporting_callbacks

from orpo_mlx.errors import ConfigError, kind_and_reason
from orpo_mlx.reporting.callbacks import NamedCallback, TrainingCallback
from orpo_mlx.reporting.services import SERVICES

TENSORBOARD = "tensorboard"
_EVENTS = "events.out.tfevents."
_NOT_DRAWN = {"iteration", "val_time"}


@contextmanager
def reporting_to(
    names: Sequence[str],
    project: str | None,
    folder: Path,
    settings: Mapping[str, Any],
    step: int | None,
    say: Callable[[str], None],
) -> Iterator[list[NamedCallback]]:
    """The callbacks of the services `names` for the run in `folder`, closed at the end of the block.

    Args:
        names: keys of `SERVICES` whose packages are installed.
        project: None leaves it to the service.
        settings: shown beside the curves.
        step: of the checkpoint that the run goes on from; None for a new run.
        say: called where a service cannot be closed, which does no harm to the run.

    Raises:
        ConfigError: a service cannot begin, for want of a login or a connection.
    """
    opened: list[NamedCallback] = []
    ended_well = False
    try:
        for name in names:
            opened.append(NamedCallback(f"`report_to={name}`", _open(name, project, folder, settings, step), True))
        yield opened
        ended_well = True
    finally:
        for name, each in zip(names, opened, strict=False):
            try:
                _close(name, each.callback, ended_well)
            # Each service raises what it likes, and must not hide how the run itself has ended.
            except Exception as error:
                say(f"Warning: {each.name}: could not be closed ({kind_and_reason(error)}).")


def _open(
    name: str, project: str | None, folder: Path, settings: Mapping[str, Any], step: int | None
) -> TrainingCallback:
    if name == TENSORBOARD:
        return EventFiles(folder / TENSORBOARD, step)
    try:
        # mlx-lm's annotation of `config` is not what it passes.
        begin: Callable[..., TrainingCallback] = get_reporting_callbacks
        return begin(name, project_name=project, log_dir=str(folder.resolve()), config=dict(settings))
    except Exception as error:  # Of a service's own kind: no login, no connection, no such project.
        raise ConfigError(
            f"`report_to={name}`: does not begin ({kind_and_reason(error)}); mend that, or leave `report_to` out."
        ) from error


def _close(name: str, callback: TrainingCallback, ended_well: bool) -> None:
    if isinstance(callback, EventFiles):
        callback.close()
        return
    service = SERVICES[name]
    # mlx-lm's callbacks never finish. Left to the end of the process, a second run of it would be reported as the first
    # one's.
    importlib.import_module(service.package).finish(**({} if ended_well else service.failed))


class EventFiles:
    """TensorBoard's event files below `folder`: `train` and `valid`, with the same tags, so that they share charts.

    Args:
        folder: made where it is not there.
        step: of the checkpoint that the run goes on from: later events, and those of evaluations at that step, are
            taken back, since they come again. None for a new run, which removes the files of an earlier one.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        # A report comes before its step's checkpoint, an evaluation after it.
        first = {"train": 0 if step is None else step + 1, "valid": step or 0}
        resumed = step is not None
        self._writers = {name: EventFile(folder / name, start, resumed=resumed) for name, start in first.items()}

    def on_train_loss_report(self, train_info: dict[str, Any], /) -> None:
        """Write the figures of a training report."""
        self._write("train", train_info, "train_")

    def on_val_loss_report(self, val_info: dict[str, Any], /) -> None:
        """Write the figures of an evaluation."""
        self._write("valid", val_info, "val_")

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()

    def _write(self, split: str, info: Mapping[str, Any], prefix: str) -> None:
        figures = {key.removeprefix(prefix): float(value) for key, value in info.items() if key not in _NOT_DRAWN}
        self._writers[split].write(info["iteration"], figures)


class EventFile:
    """One event file, whose events are on their way to the disk when a call returns."""

    # tensorboardX's `SummaryWriter` leaves writing to a thread, which a full disk ends, and with it, in time, the run
    # that waits for it. This writes the records that it would write.

    def __init__(self, folder: Path, first: int, *, resumed: bool) -> None:
        # Optional packages; `require_installed` has looked.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The step it begins at and no date: TensorBoard reads files in the order of their names, and clocks go wrong.
        own = f"{_EVENTS}{first:010d}"
        for path in folder.glob(f"{_EVENTS}*"):
            if not resumed or path.name >= own:
                path.unlink()
        self._records = RecordWriter(str(folder.resolve() / own))
        self._put(file_version="brain.Event:2")
        if resumed:
            # Readers forget all they have seen from this step on.
            self._put(step=first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._records.flush()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._put(step=step, summary=self._summary(value=values))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _put(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())

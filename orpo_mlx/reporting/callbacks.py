"""Callbacks of a run: objects with the methods of mlx-lm's `TrainingCallback`, and what they receive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from orpo_mlx.errors import ConfigError, TrainingError, kind_and_reason

JUDGED_METHOD = "on_judged_report"
"""A further method, which a callback may have or not."""
METHODS = ("on_train_loss_report", "on_val_loss_report")
# mlx-lm reports memory in GB.
_GB_PER_GIB = 2**30 / 1e9
# Figures of a training report that have a name in mlx-lm.
_RENAMED = {"loss": "train_loss", "pair_tokens_per_s": "tokens_per_second", "learning_rate": "learning_rate"}


class TrainingCallback(Protocol):
    """What a callback is: mlx-lm's `mlx_lm.tuner.callbacks.TrainingCallback`, or anything with these two methods.

    A subclass of this may have one of them only.
    """

    def on_train_loss_report(self, train_info: dict[str, Any], /) -> None:
        """Called every `steps_per_report` steps with `iteration`, `train_loss`, `learning_rate`,
        `iterations_per_second`, `tokens_per_second`, `trained_tokens`, `peak_memory` (GB), and the metrics under TRL's
        names, such as `rewards/accuracies`: means since the last report."""
        return None

    def on_val_loss_report(self, val_info: dict[str, Any], /) -> None:
        """Called before the first step and every `steps_per_eval` steps with `iteration`, `val_loss`, `val_time`
        (seconds), and the other metrics of the valid split, such as `val_rewards/accuracies`."""
        return None


class NamedCallback(NamedTuple):
    """A callback, and what an error calls it."""

    name: str
    callback: TrainingCallback
    takes_any: bool = False
    """Whether it shows whatever figures an evaluation has, as services do; others may count on a loss among them."""


def named_callbacks(callbacks: Sequence[TrainingCallback]) -> list[NamedCallback]:
    """The callbacks given in Python; ConfigError where one lacks a method."""
    if not isinstance(callbacks, Iterable):
        raise ConfigError(f"callbacks: found {type(callbacks).__name__}, expected a list of callbacks.")
    found = []
    for number, callback in enumerate(callbacks):
        name = f"callbacks[{number}] ({getattr(type(callback), '__name__', 'callback')})"
        missing = [method for method in METHODS if not callable(getattr(callback, method, None))]
        if missing:
            raise ConfigError(
                f"{name}: has no {missing[0]}; make it a subclass of mlx_lm.tuner.callbacks.TrainingCallback."
            )
        found.append(NamedCallback(name, callback))
    return found


class Callbacks:
    """All callbacks of a run, called one after the other, each with a dictionary of its own.

    Args:
        callbacks: in the order of calling.
        guard: makes a block around each call, which keeps what the run depends on.
    """

    def __init__(
        self, callbacks: Sequence[NamedCallback] = (), guard: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._callbacks = callbacks
        self._guard = guard

    def report_training(
        self, step: int, report: Mapping[str, float], *, steps: int, seconds: float, trained_tokens: int
    ) -> None:
        """Tell them of a training report over the last `steps` steps, which took `seconds`.

        Raises:
            TrainingError: one of them raised an exception; names it and the step.
        """
        own = {key: value for key, value in report.items() if key not in _RENAMED and key != "peak_memory_gib"}
        known = {name: report[key] for key, name in _RENAMED.items() if key in report}
        info = {
            "iteration": step,
            **known,
            "iterations_per_second": steps / max(seconds, 1e-9),
            "trained_tokens": trained_tokens,
            "peak_memory": report["peak_memory_gib"] * _GB_PER_GIB,
            **own,
        }
        self._call("on_train_loss_report", step, info)

    def report_validation(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Tell them of an evaluation of the valid split that took `seconds`.

        Raises:
            TrainingError: one of them raised an exception; names it and the step.
        """
        named = {f"val_{key}": value for key, value in metrics.items()}
        self._call("on_val_loss_report", step, {"iteration": step, "val_time": seconds, **named})

    def report_judged(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell them of replies that were judged: services, as of an evaluation, and others that have a method for it.

        Raises:
            TrainingError: one of them raised an exception; names it and the step.
        """
        info = {"iteration": step, **{f"val_{key}": value for key, value in figures.items()}}
        for each in self._callbacks:
            if hasattr(each.callback, JUDGED_METHOD):
                self._call_one(each, JUDGED_METHOD, step, info)
            elif each.takes_any:
                self._call_one(each, "on_val_loss_report", step, info)

    def _call(self, method: str, step: int, info: Mapping[str, Any]) -> None:
        for each in self._callbacks:
            self._call_one(each, method, step, info)

    def _call_one(self, each: NamedCallback, method: str, step: int, info: Mapping[str, Any]) -> None:
        try:
            with self._guard():
                getattr(each.callback, method)(dict(info))
        # Whatever it is, and sys.exit() too: a night's work must not go with it. Ctrl-C ends a run properly.
        except (Exception, SystemExit) as error:
            raise TrainingError(f"step {step}: {each.name}, {method}: {kind_and_reason(error)}") from error

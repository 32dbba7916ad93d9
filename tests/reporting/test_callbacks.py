"""Callbacks of the user's own: what they are called with and when, and that they can do the run no harm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tuner.callbacks import TrainingCallback as MlxLmCallback
from rich.console import Console

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError, TrainingError
from orpo_mlx.reporting.callbacks import Callbacks, NamedCallback, named_callbacks
from orpo_mlx.reporting.callbacks import TrainingCallback as OwnCallback
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.train import train
from orpo_mlx.training.distributed import Ranks
from tests.helpers.kill_and_resume import records, same
from tests.training.checkpoints.test_resume import fail_before

QUIET = Reporter(Console(quiet=True))
LONG = {"iters": 6, "steps_per_report": 2, "steps_per_eval": 3, "val_batches": 1}
MLX_LM_KEYS = {
    "iteration",
    "train_loss",
    "learning_rate",
    "iterations_per_second",
    "tokens_per_second",
    "trained_tokens",
    "peak_memory",
}
"""Of mlx_lm.tuner.trainer.train."""


class Recording(MlxLmCallback):
    """Remembers what it is called with."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.val: list[dict[str, Any]] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.train.append(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.val.append(val_info)


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for row in records(folder) if row["split"] == split]


def steps(infos: list[dict[str, Any]]) -> list[int]:
    return [info["iteration"] for info in infos]


def test_callbacks_are_told_what_the_run_reports_under_mlx_lms_names(settings: dict[str, Any]) -> None:
    recording = Recording()
    result = train(TrainingConfig(**settings | LONG), QUIET, callbacks=[recording])
    reports, evaluations = (rows(result.adapter_path, split) for split in ("train", "valid"))
    assert steps(recording.train) == [2, 4, 6]
    assert steps(recording.val) == [0, 3, 6]
    for info, row in zip(recording.train, reports, strict=True):
        assert info.keys() >= MLX_LM_KEYS
        assert info["train_loss"] == row["loss"]
        assert info["tokens_per_second"] == row["pair_tokens_per_s"]
        assert info["peak_memory"] * 1e9 == pytest.approx(row["peak_memory_gib"] * 2**30)
        for key in ("rewards/accuracies", "rewards/margins", "logps/chosen", "learning_rate", "grad_norm"):
            assert info[key] == row[key]
    tokens = [info["trained_tokens"] for info in recording.train]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == result.trained_tokens
    seconds = sum(2 / info["iterations_per_second"] for info in recording.train)
    assert seconds == pytest.approx(result.training_seconds)
    for info, row in zip(recording.val, evaluations, strict=True):
        assert info["val_loss"] == row["loss"]
        assert info["val_rewards/accuracies"] == row["rewards/accuracies"]
        assert info["val_time"] > 0


class Meddling(Recording):
    """Draws random numbers and changes what it is given."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        mx.eval(mx.random.uniform(shape=(3,)))
        train_info.clear()

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        mx.random.seed(7)
        val_info.clear()


def test_a_callback_changes_no_number_and_not_what_the_next_one_is_told(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {**LONG, "lora_parameters": {"dropout": 0.1}}
    train(TrainingConfig(**settings | {"adapter_path": str(tmp_path / "without")}), QUIET)
    recording = Recording()
    train(TrainingConfig(**settings), QUIET, callbacks=[Meddling(), recording])
    assert same(tmp_path / "without", Path(settings["adapter_path"]))
    assert all("train_loss" in info for info in recording.train)


class Failing(Recording):
    """Raises at a step."""

    def __init__(self, where: str, step: int, error: BaseException) -> None:
        super().__init__()
        self.where, self.step, self.error = where, step, error

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        super().on_train_loss_report(train_info)
        self._fail("train", train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        super().on_val_loss_report(val_info)
        self._fail("val", val_info)

    def _fail(self, where: str, info: dict[str, Any]) -> None:
        if (where, info["iteration"]) == (self.where, self.step):
            raise self.error


@pytest.mark.parametrize(
    ("where", "step", "error", "said"),
    [
        ("train", 4, ValueError("no\nsuch key."), "ValueError: no such key"),
        pytest.param("train", 6, SystemExit(3), "SystemExit: 3", marks=pytest.mark.slow),
        ("val", 3, AssertionError(), "AssertionError"),
        ("val", 6, OSError(28, "No space left on device"), r"OSError: \[Errno 28\] No space left on device"),
    ],
)
def test_an_error_in_a_callback_ends_the_run_saved_and_resumed_it_is_the_run_it_would_have_been(
    settings: dict[str, Any], tmp_path: Path, where: str, step: int, error: BaseException, said: str
) -> None:
    # Only the last step has a checkpoint of its own.
    settings |= {**LONG, "save_every": 100, "lora_parameters": {"dropout": 0.1}}
    train(TrainingConfig(**settings | {"adapter_path": str(tmp_path / "whole")}), QUIET)
    config = TrainingConfig(**settings)
    expected = (
        rf"^step {step}: callbacks\[0\] \(Failing\), on_{where}_loss_report: {said}; step {step} is saved, go on with "
        rf"orpo-mlx train --resume --adapter-path {config.adapter_path}$"
    )
    failing = Failing(where, step, error)
    with pytest.raises(TrainingError, match=expected) as caught:
        train(config, QUIET, callbacks=[failing])
    assert caught.value.__cause__ is not None
    recording = Recording()
    train(dataclasses.replace(config, resume=True), QUIET, callbacks=[recording])
    assert same(tmp_path / "whole", Path(settings["adapter_path"]))
    assert steps(failing.train) + steps(recording.train) == [2, 4, 6]
    # What an evaluation at the step of the checkpoint gave is given again: it comes after the checkpoint.
    assert sorted({*steps(failing.val), *steps(recording.val)}) == [0, 3, 6]
    assert len(steps(recording.val)) == len({*steps(recording.val)})


def test_an_error_before_the_first_step_says_that_nothing_was_saved(settings: dict[str, Any]) -> None:
    failing = Failing("val", 0, KeyError("loss"))
    with pytest.raises(TrainingError, match=r"^step 0: callbacks\[0\] .* KeyError: 'loss'; nothing was saved$"):
        train(TrainingConfig(**settings), QUIET, callbacks=[failing])


def test_a_callback_stops_a_run_as_ctrl_c_does(settings: dict[str, Any]) -> None:
    failing = Failing("train", 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="step 4 is saved, go on with"):
        train(TrainingConfig(**settings | LONG), QUIET, callbacks=[failing])
    assert steps(failing.train) == [2, 4]


@pytest.mark.parametrize("save_every", [3, *(pytest.param(every, marks=pytest.mark.slow) for every in (1, 100))])
def test_steps_after_the_last_save_are_told_again_only_by_the_run_that_takes_them_again(
    settings: dict[str, Any], save_every: int
) -> None:
    config = TrainingConfig(**settings | LONG | {"save_every": save_every})
    first, second = Recording(), Recording()
    with pytest.MonkeyPatch.context() as patch:
        fail_before(4, patch)
        with pytest.raises(TrainingError, match="step 3 is saved"):
            train(config, QUIET, callbacks=[first])
    train(dataclasses.replace(config, resume=True), QUIET, callbacks=[second])
    assert (steps(first.train), steps(second.train)) == ([2], [4, 6])
    assert (steps(first.val), steps(second.val)) == ([0, 3], [3, 6])


class Second(Ranks):
    """Not the one that speaks."""

    @property
    def first(self) -> bool:
        return False


def test_only_rank_0_calls(settings: dict[str, Any]) -> None:
    recording = Recording()
    config = TrainingConfig(**settings | {"report_to": "tensorboard"})
    result = train(config, ranks=Second(), callbacks=[recording])
    assert (recording.train, recording.val) == ([], [])
    assert not Path(settings["adapter_path"]).exists()
    assert result.adapter_path == Path(settings["adapter_path"])


class Half:
    """Lacks a method."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None: ...


class Inherited(OwnCallback):
    """Has one of its own and one of the protocol's."""

    def on_train_loss_report(self, train_info: dict[str, Any], /) -> None:
        raise ValueError


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ([Recording(), Half()], r"callbacks\[1\] \(Half\): has no on_val_loss_report; make it a subclass of"),
        ([print], r"callbacks\[0\] .*: has no on_train_loss_report"),
        (Recording(), "callbacks: found Recording, expected a list of callbacks"),
    ],
)
def test_what_is_no_callback_is_named_before_anything_begins(
    callbacks: Any, expected: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=expected):
        train(TrainingConfig(**settings), callbacks=callbacks)
    assert not Path(settings["adapter_path"]).exists()


def test_judged_replies_go_to_services_and_to_those_that_ask_for_them() -> None:
    class Plain:
        def __init__(self) -> None:
            self.told: list[dict[str, Any]] = []

        def on_train_loss_report(self, info: dict[str, Any], /) -> None:
            raise AssertionError

        def on_val_loss_report(self, info: dict[str, Any], /) -> None:
            self.told.append(info)

    class Asking(Plain):
        def on_judged_report(self, info: dict[str, Any], /) -> None:
            self.told.append({**info, "own": True})

    service, plain, asking = Plain(), Plain(), Asking()
    named = [NamedCallback("s", service, True), NamedCallback("p", plain), NamedCallback("a", asking)]
    Callbacks(named).report_judged(3, {"win_rate": 0.5})
    assert service.told == [{"iteration": 3, "val_win_rate": 0.5}]
    # A callback counts on a loss in every report of the valid split.
    assert plain.told == []
    assert asking.told == [{"iteration": 3, "val_win_rate": 0.5, "own": True}]


def test_a_subclass_of_the_protocol_may_have_one_method() -> None:
    callbacks = Callbacks(named_callbacks([Inherited()]))
    callbacks.report_validation(3, {"loss": 1.0}, 0.5)
    with pytest.raises(TrainingError, match=r"step 4: callbacks\[0\] \(Inherited\), on_train_loss_report: ValueError$"):
        callbacks.report_training(4, {"peak_memory_gib": 1.0}, steps=1, seconds=1.0, trained_tokens=1)

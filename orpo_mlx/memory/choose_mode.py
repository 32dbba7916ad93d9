"""Before the first step: what its peak will be, whether the machine holds it, and which mode `--memory auto` is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import mlx.core as mx

from orpo_mlx.engine.modes import AUTOMATIC
from orpo_mlx.errors import TrainingError, UntrainableError, UserError
from orpo_mlx.memory.predict import TOLERANCE, Prediction, device_working_set, heaviest_window, predict
from orpo_mlx.memory.skeleton import read_blueprint
from orpo_mlx.training.prepare import spend_memory_as
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step_functions import StepFunctions

_GIB = 2**30
_OWN_MEMORY = 0.9
"""Share of a GPU's own memory that a run may take."""


def plan_memory(run: Run, say: Callable[[str], None]) -> None:
    """Predict a step's peak on the train split's longest pairs, and decide what `--memory auto` is.

    `auto` becomes the fastest mode whose prediction, with the room by which predictions may be off, is within what the
    device recommends or, where it recommends nothing, within half of the machine's memory; else the smallest. Without
    `memory_check` nothing is predicted, and `auto` is the fastest.

    Args:
        run: with its model loaded; `auto` changes how it spends memory.
        say: takes a line for the user.

    Raises:
        TrainingError: the prediction is beyond what the device recommends by more than predictions are off.
        UntrainableError: the model has no gradient on this device.
    """
    if not run.config.memory_check:
        return
    automatic = run.config.memory == "auto"
    # Segments need the head apart from the layers.
    modes = AUTOMATIC[: 1 if run.config.plain_head else None] if automatic else (run.memory.mode,)
    try:
        mode, prediction = _fastest(run, modes)
    except UntrainableError:
        raise
    except UserError as error:
        say(f"The peak of memory cannot be predicted: {error}")
        if automatic and run.memory.mode != modes[-1]:
            change_memory(run, modes[-1])
        return
    if mode != run.memory.mode:
        change_memory(run, mode)
    say(memory_line(prediction))
    limit = device_working_set()
    if limit is None or prediction.peak <= limit:
        return
    sentence = f"a step is predicted to take {prediction.peak:.2f} GiB, this device recommends {limit:.2f} GiB at most"
    if prediction.peak > (1 + TOLERANCE) * limit:
        remedy = "orpo-mlx fit with the same flags and `memory` shows what would fit"
        raise TrainingError(f"{sentence}; {remedy}, and `memory={mode}` `memory_check=False` tries it all the same")
    say(f"Warning: {sentence}.")


def _fastest(run: Run, modes: tuple[str, ...]) -> tuple[str, Prediction]:
    """The first of the modes that fits, or the last, and its prediction."""
    blueprint = read_blueprint(str(run.loaded.path), dtype=run.config.dtype)
    heaviest = heaviest_window(run.config, run.splits["train"].pairs)
    room = device_working_set() or _unstated_room()
    # The fastest first: each prediction costs a step of a small model.
    for mode in modes:
        prediction = predict(dataclasses.replace(run.config, memory=mode), blueprint, heaviest)
        if (1 + TOLERANCE) * prediction.peak <= room:
            break
    return mode, prediction


def _unstated_room() -> float:
    """GiB that a run may take where the device recommends nothing."""
    own = mx.device_info().get("total_memory")
    # Of a GPU with memory of its own the driver and MLX's kernels take some; of a machine half is left to the system
    # and other programs.
    if own is not None and mx.default_device() != mx.Device(mx.cpu):
        return _OWN_MEMORY * int(own) / _GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / _GIB


def memory_line(prediction: Prediction) -> str:
    """A prediction in one line, largest part first."""
    parts = sorted(prediction._asdict().items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {size:.2f}" for name, size in parts if size >= 0.005)
    return f"Predicted peak {prediction.peak:.2f} GiB{f' ({shown})' if shown else ''}."


def change_memory(run: Run, mode: str) -> None:
    """Let the run spend memory as another of `MODES` does."""
    run.scorer, run.memory = spend_memory_as(dataclasses.replace(run.config, memory=mode), run.loaded.model)
    run.functions = StepFunctions(run.scorer, run.memory, run.method, run.optimizer)
    # Or policy and reference would no longer be the same sums where they are the same model.
    if run.reference is not None:
        run.reference.scorer = run.scorer

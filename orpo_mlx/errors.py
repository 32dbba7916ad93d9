"""Errors a user can mend. Each message is one sentence: the location, what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_MOST_REASON = 300
"""Characters of another package's message that are shown: some list hundreds of tensors."""


class UserError(Exception):
    """Something outside the code is wrong; command-line tools print it on one line and exit with status 2.

    A message mentions settings as Python has them, in backticks: `seed`, `memory=fast`, `shuffle=False`. The command
    line prints them as flags (`config.flags`).
    """


class ConfigError(UserError):
    """A flag or a config key is wrong."""


class DataError(UserError):
    """A data file or one of its rows is wrong; the message begins with `file:line`."""


class ModelError(UserError):
    """A model, tokenizer or adapter cannot be used."""


class UntrainableError(ModelError):
    """A model with a layer that has no gradient on this device."""


class DeviceError(UserError):
    """MLX cannot go on with the GPU, or with its memory."""


class TrainingError(UserError):
    """A run cannot go on; the message says what was saved and how to continue."""


class NonFiniteError(TrainingError):
    """A loss, a gradient or a parameter that is NaN or infinite; nothing of that step has been applied."""


class HalfAppliedError(TrainingError):
    """A step that ended while it was applied: what is in memory is neither before nor after it, and is not saved."""


def did_you_mean(word: object, known: Iterable[str], otherwise: str = ".") -> str:
    """How a message about an unknown word ends: with the known one nearest to it, or with `otherwise`."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else otherwise


def reason_of(error: BaseException, most: int | None = _MOST_REASON, *, first_line: bool = False) -> str:
    """What an exception says, on one line of at most `most` characters without a full stop, or else its type.

    `first_line` is for exceptions whose further lines are addresses and request numbers.
    """
    said = str(error).strip()
    if first_line:
        said = said.partition("\n")[0]
    return " ".join(said.split())[:most].rstrip(".,: ") or type(error).__name__


def kind_and_reason(error: BaseException) -> str:
    """`reason_of` after the exception's type, for those that say little without it."""
    kind = type(error).__name__
    reason = reason_of(error)
    return kind if reason == kind else f"{kind}: {reason}"


_OF_THE_DEVICE = ("[METAL]", "[metal::malloc]", "[malloc]")
"""How MLX's messages begin where Metal ended some work, or memory cannot be had."""
_LESS_MEMORY = "lower `micro_batch_tokens`, take `memory=thrift`, or cut rows with `max_seq_length`"
_NEW_PROCESS = "start the command again"
_ADVICE = {
    # Codes of `MTLCommandBufferError`, as Metal writes them.
    "(00000008:": f"memory has run out: {_LESS_MEMORY}",
    "(00000002:": "a piece of work took the GPU too long: lower `micro_batch_tokens`",
    "(0000000e:": "macOS ended what kept the GPU from drawing the screen: let the display sleep, or set "
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment",
    "(00000004:": f"after earlier errors the GPU takes no more work of this process: {_NEW_PROCESS}",
    "Resource limit": f"this process holds too many arrays: {_NEW_PROCESS}",
    "malloc]": f"memory cannot be had: {_LESS_MEMORY}",
}


def device_advice(error: BaseException) -> str | None:
    """What to do about an error that MLX raised over the GPU or its memory; None for every other."""
    said = str(error)
    if not any(mark in said for mark in _OF_THE_DEVICE):
        return None
    return next((advice for mark, advice in _ADVICE.items() if mark in said), f"the GPU failed: {_NEW_PROCESS}")


@contextmanager
def naming_device_errors() -> Iterator[None]:
    """Let what MLX raises over the GPU or its memory say what to do.

    Raises:
        DeviceError: in the place of such a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        advice = device_advice(error)
        if advice is None:
            raise
        raise DeviceError(f"{reason_of(error)}; {advice}.") from error

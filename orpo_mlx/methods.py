"""The registry: a method is a loss, whether it needs a reference model, and its hyper-parameters.

Adding one takes a function in `losses.py`, a line here and a row in `tests/test_losses.py`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

from orpo_mlx import losses
from orpo_mlx.errors import ConfigError
from orpo_mlx.types import LossOutput, PairLogProbs

Loss = Callable[..., LossOutput]


class Method(NamedTuple):
    """One way to learn from pairs."""

    loss: Loss
    """`loss(logps, **parameters) -> LossOutput`."""
    needs_reference: bool
    equation: str
    source: str

    @property
    def defaults(self) -> dict[str, float]:
        """The loss's keyword-only parameters and their default values."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "orpo": Method(losses.orpo, False, "NLL(y_w) - β log σ(log OR)", "Hong et al. 2024, arXiv:2403.07691, eq. 6"),
    "orpo_style": Method(losses.orpo_style, False, "-log σ(log OR) + β (logp_l - logp_w)", "course chapter on ORPO"),
    "dpo": Method(
        losses.dpo,
        True,
        "-log σ(β (log π/π_ref(y_w) - log π/π_ref(y_l)))",
        "Rafailov et al. 2023, arXiv:2305.18290, eq. 7",
    ),
    "sft": Method(losses.sft, False, "NLL(y_w)", "maximum likelihood"),
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"--method {name}: unknown method, expected one of {', '.join(METHODS)}{hint}")
    return METHODS[name]


def resolve_parameters(name: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """The method's parameters: its defaults, overridden by what was given and is not None.

    Raises:
        ConfigError: a parameter the method does not have.
    """
    defaults = get_method(name).defaults
    chosen = {key: value for key, value in given.items() if value is not None}
    for key in chosen:
        if key not in defaults:
            has = ", ".join(defaults) or "no parameters"
            raise ConfigError(f"--{key.replace('_', '-')}: method {name} has no such parameter; it has {has}.")
    return {**defaults, **chosen}


def bind(name: str, parameters: Mapping[str, float]) -> Callable[[PairLogProbs], LossOutput]:
    """The method's loss with its parameters filled in."""
    return functools.partial(get_method(name).loss, **parameters)

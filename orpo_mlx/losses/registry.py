"""The registry of preference losses: each loss carries its card, and the decorator that takes the card registers it.

Adding a loss is one decorated function in `reference_free.py`, `with_reference.py`, `unpaired.py` or `listwise.py`, and
its float64 oracle in `tests/helpers/`. No other code depends on a loss's name: texts may mention one as an example.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeVar

from orpo_mlx.types import SUMS_ALONE, Wanted

PAIR, COMPLETION, LIST = "pair", "completion", "list"
"""What a loss is of: a pair, a completion that is good or bad, or the whole list of a prompt's completions."""

Loss = Callable[..., Any]
BoundLoss = Callable[[Any], Any]
"""`PairLogProbs` to `LossOutput`, or `GroupLogProbs` to `GroupLossOutput`."""


class Range(NamedTuple):
    """The values a hyper-parameter can have."""

    text: str
    """To follow "expected a number"."""
    holds: Callable[[float], bool]


# The range of a hyper-parameter stands in its annotation, so that it is read beside the loss that needs it.
Positive = Annotated[float, Range("above 0", lambda value: value > 0)]
NonNegative = Annotated[float, Range("0 or more", lambda value: value >= 0)]
UnitInterval = Annotated[float, Range("above 0 and below 1", lambda value: 0 < value < 1)]
Share = Annotated[float, Range("from 0 to 1", lambda value: 0 <= value <= 1)]
AnyNumber = Annotated[float, Range("of any size", math.isfinite)]
NoiseRate = Annotated[float, Range("0 or more and below 0.5", lambda value: 0 <= value < 0.5)]


class Parameter(NamedTuple):
    """A hyper-parameter of one loss."""

    default: float
    range: Range


class Method(NamedTuple):
    """A loss and its card."""

    loss: Loss
    """`loss(logps, **parameters) -> LossOutput`."""
    equation: str
    """In the notation of `recipe.NOTATION`."""
    source: str
    needs_reference: bool
    couples_pairs: bool
    """Whether a pair's loss depends on the other pairs of its batch."""
    wanted: Wanted
    """What it reads besides summed log-probs."""
    takes_weights: bool
    """Whether each of its losses is one pair's, which a weight can multiply."""
    takes_margin: bool
    """Whether it heeds `PairLogProbs.margin`."""
    parameters: dict[str, Parameter]
    one_sided: bool
    """Whether it looks at the chosen side alone, so that rows of one completion are enough."""
    unit: str
    """What it is a loss of: `PAIR`, `COMPLETION` or `LIST`."""

    @property
    def defaults(self) -> dict[str, float]:
        """Default values by parameter."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


METHODS: dict[str, Method] = {}
"""Every registered loss, by the name `--method` takes."""

LossFunction = TypeVar("LossFunction", bound=Loss)


def preference_loss(
    *,
    equation: str,
    source: str,
    needs_reference: bool = False,
    couples_pairs: bool = False,
    wanted: Wanted = SUMS_ALONE,
    takes_weights: bool = True,
    takes_margin: bool = False,
    one_sided: bool = False,
    unit: str = PAIR,
) -> Callable[[LossFunction], LossFunction]:
    """Register a loss under its function's name; its docstring gets equation and source as well.

    Args:
        equation: the loss of one pair, in the notation of `recipe.NOTATION`.
        source: the paper, as `--list-methods` and the model card cite it.
        needs_reference: whether the loss reads `reference_chosen` and `reference_rejected`.
        couples_pairs: whether a pair's loss depends on the other pairs of its batch. Such a loss is given all pairs of
            a step at once, however the step is divided into micro-batches.
        wanted: what it reads of `PairLogProbs` that is not there for every loss.
        takes_weights: whether each of its losses is one pair's. False where losses are of ranks in the batch: rows with
            weights are then refused.
        takes_margin: whether it heeds `PairLogProbs.margin` (`terms.loss_margin`).
        one_sided: whether it looks at the chosen side alone.
        unit: `PAIR`: it is given `PairLogProbs`, for a loss of each pair; `COMPLETION` or `LIST`: `GroupLogProbs`, for
            one of each completion or of each list.

    Raises:
        ValueError: the name is taken, or a keyword-only parameter has no range in its annotation.
    """

    def register(loss: LossFunction) -> LossFunction:
        name = loss.__name__
        if name in METHODS:
            raise ValueError(f"there is a loss {name} already.")
        METHODS[name] = Method(
            loss,
            equation,
            source,
            needs_reference,
            couples_pairs,
            wanted._replace(groups=unit != PAIR),
            takes_weights,
            takes_margin,
            _parameters(loss),
            one_sided,
            unit,
        )
        loss.__doc__ = f"{inspect.getdoc(loss)}\n\nL = {equation}. Source: {source}."
        return loss

    return register


def _parameters(loss: Loss) -> dict[str, Parameter]:
    # Annotations are strings until they are looked up, as `from __future__ import annotations` leaves them.
    hints = typing.get_type_hints(loss, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            ranges: tuple[Any, ...] = getattr(hints[name], "__metadata__", ())
            if len(ranges) != 1 or not isinstance(ranges[0], Range):
                raise ValueError(f"{loss.__name__}: annotate {name} with the range of its values, such as Positive.")
            found[name] = Parameter(parameter.default, ranges[0])
    return found

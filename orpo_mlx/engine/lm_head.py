"""The head of a model, told apart from its body: hidden states to logits, of all tokens or of some."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from orpo_mlx.engine.equivalence import close

Rows = slice | mx.array
"""Which rows of a head's weight, that is which tokens: a slice or (n,) ids."""

_WRAPPED = "language_model"
_BACKBONES = ("model", "transformer", "backbone", "gpt_neox", _WRAPPED)


class ModelHead:
    """A model's own head, whatever it does: tied, biased, quantised, scaled, capped.

    It runs the model's own `__call__` on a stand-in whose backbone returns the given states; for some tokens only, the
    module that maps states to logits is one with those rows of its weight.

    Args:
        model: an mlx-lm model.
        backbone_name: what in it maps ids to hidden states, as in the names of its parameters ("model",
            "language_model.model").
        vocabulary: number of logits.
        tiles: whether the head may be run for some tokens only; `find_head` proves it.
    """

    def __init__(self, model: nn.Module, backbone_name: str, vocabulary: int, *, tiles: bool) -> None:
        self.model, self.backbone_name, self.vocabulary, self.tiles = model, backbone_name, vocabulary, tiles
        wrapper, _, self._name = backbone_name.rpartition(".")
        self._owner = inner_module(model, wrapper)

    @property
    def backbone(self) -> Any:
        """Ids (R, L) to hidden states (R, L, H)."""
        return inner_module(self._owner, self._name)

    def __call__(self, hidden: mx.array, rows: Rows | None = None) -> mx.array:
        """Logits (..., V) of hidden states (..., H), or of the tokens `rows` only."""
        states = hidden if hidden.ndim == 3 else hidden[None]
        call: Callable[..., mx.array] = type(self._owner).__call__
        dummy_ids = mx.zeros(states.shape[:2], mx.int32)
        cut = None if rows is None else (self.vocabulary, rows)
        logits = call(_StandIn(self._owner, self._name, states, cut), dummy_ids)
        return logits if hidden.ndim == 3 else logits[0]

    @property
    def is_frozen(self) -> bool:
        """Whether nothing outside of the backbone's layers is trained."""
        return not self.trained

    @property
    def trained(self) -> dict[str, mx.array]:
        """What is trained outside of the backbone's layers, by flat name: the head's, and a tied embedding's."""
        prefix = f"{self.backbone_name}.layers."
        parameters: dict[str, mx.array] = dict(tree_flatten(self.model.trainable_parameters()))
        return {name: value for name, value in parameters.items() if not name.startswith(prefix)}

    def update(self, parameters: Mapping[str, mx.array]) -> None:
        """Set parameters by flat name."""
        self.model.update(tree_unflatten(list(parameters.items())))


class _StandIn:
    """Answers for `owner`, except that its backbone, when called, returns given states, and that of modules with a row
    for each token only some rows are shown."""

    def __init__(self, owner: Any, name: str | None, states: mx.array, cut: tuple[int, Rows] | None) -> None:
        self._owner, self._name, self._states, self._cut = owner, name, states, cut

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._owner, name)
        if name == self._name:
            return _StandIn(value, None, self._states, self._cut)
        if self._cut is not None and isinstance(value, nn.Module) and "weight" in value:
            vocabulary, rows = self._cut
            if value["weight"].shape[0] == vocabulary:
                return some_rows(value, rows)
        return value

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._states


def some_rows(module: nn.Module, rows: Rows) -> nn.Module:
    """The same linear layer or embedding, plain or quantised, for some of its tokens."""
    part = copy.copy(module)
    for name in ("weight", "bias", "scales", "biases"):
        if name in module:
            part[name] = module[name][rows]
    return part


def find_head(model: nn.Module) -> ModelHead | None:
    """The model's head, proven on a few tokens to be one; None where none could be told apart from the body."""
    ids = mx.array([[1, 2, 3, 1, 2]], mx.int32)
    for name in backbone_names(model):
        try:
            hidden, logits = inner_module(model, name)(ids), model(ids)
            head = ModelHead(model, name, logits.shape[-1], tiles=False)
            if close(head(hidden), logits):
                head.tiles = tiles_fit(head, hidden, logits)
                return head
        # What bears such a name and is no backbone fails in one of these ways when it is run as one.
        except (AttributeError, TypeError, ValueError):
            continue
    return None


def backbone_names(model: nn.Module) -> list[str]:
    """Names that a backbone may have. Vision-language models wrap a causal language model, which has the backbone; to
    the wrapper that whole model would look like one, with logits for states, so inner names come first."""
    names = []
    wrapper = model.get(_WRAPPED)
    if isinstance(wrapper, nn.Module):
        names = [f"{_WRAPPED}.{name}" for name in backbone_names(wrapper)]
    return names + [
        name for name in _BACKBONES if isinstance(model.get(name), nn.Module) and hasattr(model[name], "layers")
    ]


def inner_module(module: nn.Module, path: str) -> Any:
    """The module of that dotted name; the module itself where it is empty."""
    for name in filter(None, path.split(".")):
        module = module[name]
    return module


def tiles_fit(head: ModelHead, hidden: mx.array, logits: mx.array) -> bool:
    """Whether the head run for some tokens gives the very logits of those tokens."""
    # The two ways in which `tiled_logps` asks for tokens: some in a row, and the targets in any order.
    choices: list[Rows] = [slice(1, 4), mx.array([2, 0, 3])]
    try:
        return all(close(head(hidden, rows), logits[..., rows]) for rows in choices)
    except (AttributeError, TypeError, ValueError):
        return False

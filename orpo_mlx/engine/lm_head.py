"""The head: hidden states to log-probs of given tokens, and their gradient in the same sweep.

Reductions over the vocabulary run in float32 whatever the model's dtype, and in two levels, because one long float32
sum drifts. All logits never exist at one time: the head is run on tiles of rows and vocabulary, one after another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from orpo_mlx.engine.equivalence import close
from orpo_mlx.engine.fast_exp import exp

Head = Callable[[mx.array], mx.array]
"""Hidden states (..., H) to logits (..., V)."""

Rows = slice | mx.array
"""Which rows of a head's weight, that is which tokens: a slice or (n,) ids."""

_SUM_BLOCK = 128
_TILE_ROWS, _TILE_TOKENS = 256, 2048
_CHUNK_BYTES = 4 << 20
_WRAPPED = "language_model"
_BACKBONES = ("model", "transformer", "backbone", "gpt_neox", _WRAPPED)
_SEEDS = 1 << 30


def log_sum_exp(logits: mx.array) -> tuple[mx.array, mx.array]:
    """(m, s) with m = max_v logits_v and m + s = log Σ_v exp(logits_v) over the last axis, in float32.

    The sum runs over blocks of 128 and then over the blocks: against float64, one float32 sum over 151,936 columns is
    3.6e-4 nats off, this one about 2e-6. The two terms are kept apart, since adding a small s to a large m loses s.

    Args:
        logits: (..., V) of any float dtype.
    """
    logits = logits.astype(mx.float32)
    peak = mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    exps = mx.exp(logits - peak)
    return peak.squeeze(-1), mx.log(_sum_in_blocks(exps))


def _sum_in_blocks(terms: mx.array) -> mx.array:
    """Σ over the last axis in two levels."""
    whole = terms.shape[-1] // _SUM_BLOCK * _SUM_BLOCK
    total = terms[..., whole:].sum(axis=-1)
    if whole:
        total = total + terms[..., :whole].reshape(*terms.shape[:-1], -1, _SUM_BLOCK).sum(axis=-1).sum(axis=-1)
    return total


def token_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """log softmax(logits)[targets] in nats: (..., V) logits of any float dtype, (...) integer targets -> (...) float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}.")
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    peak, rest = log_sum_exp(logits)
    return (picked.astype(mx.float32) - peak) - rest


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
        self._owner = _inner(model, wrapper)

    @property
    def backbone(self) -> Any:
        """Ids (R, L) to hidden states (R, L, H)."""
        return _inner(self._owner, self._name)

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
                return _some_rows(value, rows)
        return value

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._states


def _some_rows(module: nn.Module, rows: Rows) -> nn.Module:
    """The same linear layer or embedding, plain or quantised, for some of its tokens."""
    part = copy.copy(module)
    for name in ("weight", "bias", "scales", "biases"):
        if name in module:
            part[name] = module[name][rows]
    return part


def head_logps(head: ModelHead, hidden: mx.array, targets: mx.array, *, gradient: bool = True) -> mx.array:
    """Log-prob of each target under a frozen head, without ever holding all logits: (N, H), (N,) -> (N,) float32.

    ∂logp/∂hidden = ∂logit[target]/∂hidden - Σ_v softmax_v ∂logit_v/∂hidden, for a plain head W[target] - softmax W,
    does not depend on the loss. So one sweep takes both the log-prob and this (N, H) gradient, and the backward pass is
    a multiplication by the incoming cotangent. The sweep goes over tiles of rows and tokens, as FlashAttention's does
    over keys (Dao et al. 2022): sums are rescaled when a larger logit turns up. Tiles wait for one another, or the lazy
    scheduler would hold several at once.

    The head's own parameters receive no gradient: `trained_head_logps` is for where they are trained.

    Args:
        head: the model's head; where it cannot be run in tiles, rows are taken a few at a time.
        hidden: (N, H).
        targets: (N,) token ids.
        gradient: False skips the gradient, for evaluation.
    """
    chunk = _tiled if head.tiles else _untiled
    rows = _TILE_ROWS if head.tiles else max(16, _CHUNK_BYTES // (4 * head.vocabulary))

    def sweep(hidden: mx.array, targets: mx.array) -> list[mx.array]:
        done: list[list[mx.array]] = []
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            part = mx.depends([part], done[-1])[0] if done else part
            done.append(chunk(head, part, targets[start : start + rows], gradient))
        return [mx.concatenate(list(parts)) for parts in zip(*done, strict=True)]

    if not gradient:
        return sweep(hidden, targets)[0]
    function: Any = mx.custom_function(sweep)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        grads = cotangents[0][:, None] * outputs[1].astype(mx.float32)
        return grads.astype(primals[0].dtype), mx.zeros_like(primals[1])

    logps: mx.array = function(hidden, targets)[0]
    return logps


def trained_head_logps(head: ModelHead, hidden: mx.array, targets: mx.array) -> mx.array:
    """Log-prob of each target under a head that is trained: (N, H), (N,) -> (N,) float32.

    Rows go through the head a few at a time, one chunk after another; the backward pass runs each chunk again, so that
    logits of one chunk exist at a time, and gives the head's parameters their gradient as well.

    Args:
        head: the model's head.
        hidden: (N, H).
        targets: (N,) token ids.
    """
    values = head.trained
    rows = max(16, _CHUNK_BYTES // (4 * head.vocabulary))
    starts = range(0, hidden.shape[0], rows)
    # Dropout must be drawn the same when a chunk runs again.
    seed = int(np.array(mx.random.randint(0, _SEEDS)))

    def chunk(start: int, part: mx.array, parameters: Sequence[mx.array]) -> mx.array:
        mx.random.seed(seed + start)
        head.update(dict(zip(values, parameters, strict=True)))
        try:
            return token_logps(head(part), targets[start : start + rows])
        finally:
            head.update(values)

    def forward(hidden: mx.array, *parameters: mx.array) -> mx.array:
        done: list[mx.array] = []
        for start in starts:
            part = hidden[start : start + rows]
            done.append(chunk(start, mx.depends([part], done[-1:])[0] if done else part, parameters))
        mx.random.seed(seed + hidden.shape[0])
        return mx.concatenate(done)

    function: Any = mx.custom_function(forward)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        hidden, *parameters = primals
        slopes: list[mx.array] = []
        sums = [mx.zeros_like(parameter) for parameter in parameters]
        for start in starts:
            part = mx.depends([hidden[start : start + rows]], [*slopes[-1:], *sums])[0]
            _, pulled = mx.vjp(
                lambda part, *parameters, start=start: chunk(start, part, parameters),
                [part, *parameters],
                [cotangent[start : start + rows]],
            )
            slopes.append(pulled[0])
            sums = [total + share for total, share in zip(sums, pulled[1:], strict=True)]
        mx.random.seed(seed + hidden.shape[0])
        return mx.concatenate(slopes), *sums

    logps: mx.array = function(hidden, *values.values())
    return logps


class _Sums(NamedTuple):
    """Of tiles so far: largest logit m (n, 1), Σ e^(logit - m) (n, 1), and Σ e^(logit - m) ∂logit/∂hidden (n, H)."""

    peak: mx.array
    total: mx.array
    slope: mx.array | None


def _tiled(head: ModelHead, hidden: mx.array, targets: mx.array, gradient: bool) -> list[mx.array]:
    """[logps] or [logps, gradients] of a few rows."""
    chosen, at_target = _run(lambda x: head(x, targets), hidden)
    # Row i's own token is column i of the logits for the targets.
    picked = mx.diag(chosen).astype(mx.float32)[:, None]
    sums: _Sums | None = None
    for low in range(0, head.vocabulary, _TILE_TOKENS):
        tokens = slice(low, min(low + _TILE_TOKENS, head.vocabulary))
        part = hidden if sums is None else mx.depends([hidden], [each for each in sums if each is not None])[0]
        sums = _with_tile(head, part, tokens, sums, gradient)
    assert sums is not None
    logps = ((picked - sums.peak) - mx.log(sums.total)).squeeze(-1)
    if sums.slope is None:
        return [logps]
    return [logps, at_target(mx.eye(targets.size, dtype=chosen.dtype)) - sums.slope / sums.total]


def _with_tile(head: ModelHead, hidden: mx.array, tokens: slice, sums: _Sums | None, gradient: bool) -> _Sums:
    tile, pull_back = _run(lambda x: head(x, tokens), hidden)
    logits = tile.astype(mx.float32)
    peak = logits.max(axis=-1, keepdims=True)
    if sums is not None:
        peak = mx.maximum(peak, sums.peak)
    exps = exp(logits - peak)
    total = _sum_in_blocks(exps)[:, None]
    slope = pull_back(exps.astype(tile.dtype)).astype(mx.float32) if gradient else None
    if sums is None:
        return _Sums(peak, total, slope)
    shrink = exp(sums.peak - peak)
    if slope is not None and sums.slope is not None:
        slope = sums.slope * shrink + slope
    return _Sums(peak, sums.total * shrink + total, slope)


def _untiled(head: ModelHead, hidden: mx.array, targets: mx.array, gradient: bool) -> list[mx.array]:
    """The same from the logits of the whole vocabulary."""
    if not gradient:
        return [token_logps(head(hidden), targets)]
    (logps,), (grads,) = mx.vjp(lambda x: token_logps(head(x), targets), [hidden], [mx.ones(targets.shape, mx.float32)])
    return [logps, grads]


def _run(function: Head, x: mx.array) -> tuple[mx.array, Head]:
    """function(x), and what pulls a cotangent of it back to x; a linear function's second forward is not evaluated."""

    def pull_back(cotangent: mx.array) -> mx.array:
        (grad,) = mx.vjp(function, [x], [cotangent])[1]
        return grad

    return function(x), pull_back


def find_head(model: nn.Module) -> ModelHead | None:
    """The model's head, proven on a few tokens to be one; None where none could be told apart from the body."""
    ids = mx.array([[1, 2, 3, 1, 2]], mx.int32)
    for name in _backbone_names(model):
        try:
            hidden, logits = _inner(model, name)(ids), model(ids)
            head = ModelHead(model, name, logits.shape[-1], tiles=False)
            if close(head(hidden), logits):
                head.tiles = _tiles_fit(head, hidden, logits)
                return head
        except (AttributeError, TypeError, ValueError):
            continue
    return None


def _backbone_names(model: nn.Module) -> list[str]:
    """Names that a backbone may have. Vision-language models wrap a causal language model, which has the backbone; to
    the wrapper that whole model would look like one, with logits for states, so inner names come first."""
    names = []
    wrapper = model.get(_WRAPPED)
    if isinstance(wrapper, nn.Module):
        names = [f"{_WRAPPED}.{name}" for name in _backbone_names(wrapper)]
    return names + [
        name for name in _BACKBONES if isinstance(model.get(name), nn.Module) and hasattr(model[name], "layers")
    ]


def _inner(module: nn.Module, path: str) -> Any:
    """The module of that dotted name; the module itself where it is empty."""
    for name in filter(None, path.split(".")):
        module = module[name]
    return module


def _tiles_fit(head: ModelHead, hidden: mx.array, logits: mx.array) -> bool:
    """Whether the head run for some tokens gives the very logits of those tokens."""
    choices: list[Rows] = [slice(1, 4), mx.array([2, 0, 3])]
    try:
        return all(close(head(hidden, rows), logits[..., rows]) for rows in choices)
    except (AttributeError, TypeError, ValueError):
        return False

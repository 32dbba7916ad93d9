"""Which token ids a model has: found by what its embedding does, since no two classes keep the number in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from orpo_mlx.errors import DataError

_EMBEDDINGS: tuple[Any, ...] = (nn.Embedding, nn.QuantizedEmbedding)


def vocabulary_of(model: nn.Module) -> int:
    """How many token ids a model has: rows of its embedding, or logits where those are fewer.

    Configs keep it under several names, in several depths, and may be wrong; MLX reads whatever memory lies beyond. So
    the model is called on ids that are never looked up (MLX computes nothing before somebody asks), and each embedding
    that is given those very ids says how many rows it has.
    """
    embeddings = [module for _, module in model.named_modules() if isinstance(module, _EMBEDDINGS)]
    rows = [int(module["weight"].shape[0]) for module in embeddings]
    # Not 0, 1, 2 as positions are; and with the last id, which models clip before tables that are shorter on purpose.
    probe = mx.array([[1, 0, max(rows, default=2) - 1]], mx.int32)
    with _seeing_calls() as calls:
        logits = model(probe)
    asked = [rows for rows, ids in calls if ids.shape == probe.shape and mx.array_equal(ids, probe).item()]
    return min([*asked, int(logits.shape[-1])])


def check_ids(vocabulary: int, ids: Sequence[int], location: str) -> None:
    """Make sure that a model with so many token ids has those of a row, or of a prompt, that stands at `location`.

    Raises:
        DataError: it does not have all of them.
    """
    for token in (max(ids, default=0), min(ids, default=0)):
        if not 0 <= token < vocabulary:
            raise DataError(
                f"{location}: token id {token} is outside the model's vocabulary of {vocabulary}; the row, or the "
                "tokenizer that made it, belongs to another model."
            )


@contextmanager
def _seeing_calls() -> Iterator[list[tuple[int, mx.array]]]:
    """What embeddings are called with inside the `with` block: how many rows each has, and the ids."""
    calls: list[tuple[int, mx.array]] = []
    own = [kind.__call__ for kind in _EMBEDDINGS]

    def watched(call: Any) -> Any:
        def seen(module: nn.Module, ids: mx.array) -> mx.array:
            calls.append((int(module["weight"].shape[0]), ids))
            result: mx.array = call(module, ids)
            return result

        return seen

    # On the classes: Python looks `__call__` up nowhere else.
    for kind, call in zip(_EMBEDDINGS, own, strict=True):
        kind.__call__ = watched(call)
    try:
        yield calls
    finally:
        for kind, call in zip(_EMBEDDINGS, own, strict=True):
            kind.__call__ = call

"""When a device is given what has been built of a pass in pieces, and in which order it computes that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


class Handover:
    """When what has been built of a pass is given to the device.

    Args:
        pieces: how many the pass is built in.
        parts: how many times the device is given some of them, for it to begin while the host builds on; what is left
            then is for the caller to evaluate. 0 evaluates each piece before the next is built.
    """

    def __init__(self, pieces: int, parts: int) -> None:
        self._pieces, self._parts = pieces, parts
        self._size = -(-pieces // (parts + 1))
        self._built = 0

    def piece(self, *trees: Any) -> None:
        """A piece has been built; `trees` are all arrays of the pass that are wanted still."""
        self._built += 1
        if not self._parts:
            mx.eval(trees)
        elif self._built % self._size == 0 and self._built < self._pieces:
            mx.async_eval(trees)

    def after(self, arrays: Sequence[mx.array], others: Any) -> tuple[mx.array, ...]:
        """`arrays`, which the device does not use before it has computed `others`.

        What is given to it together would else be computed in any order that fits, all layers' activations at once.
        """
        # MLX 0.32.4 crashes where it is given no arrays.
        if not self._parts or not arrays:
            return tuple(arrays)
        flat: dict[str, mx.array] = dict(tree_flatten(others))
        return tuple(mx.depends(list(arrays), list(flat.values())))

"""Weights that are made from their names, so that a stored result needs no stored weights."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt


def named_weights(shapes: dict[str, list[int]]) -> dict[str, npt.NDArray[np.float32]]:
    """Normal numbers for each name and shape: of deviation 0.15; vectors of 0.1, around 1 where they are norms."""
    weights = {}
    for name, shape in shapes.items():
        numbers = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        vector = len(shape) == 1
        # 1 is neutral for most norms, and far from it for those that add 1 themselves: a wrong one shows.
        centre = 1.0 if vector and "norm" in name else 0.0
        weights[name] = (centre + numbers * (0.1 if vector else 0.15)).astype(np.float32)
    return weights

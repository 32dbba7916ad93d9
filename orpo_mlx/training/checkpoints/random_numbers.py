"""MLX's random numbers, read and put back, so that a run draws the same ones however often it was interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

RandomState = tuple[int, int]
"""The two 32-bit words of MLX's key, the higher one first."""


def random_state() -> RandomState:
    """MLX's random state."""
    state: Any = mx.random.state
    high, low = np.array(state[0]).tolist()
    return int(high), int(low)


def set_random_state(state: Sequence[int]) -> None:
    """Put MLX's random numbers back to where `random_state` found them."""
    # MLX has no setter for its state; a seed of 64 bits becomes a key of these very two words.
    mx.random.seed((state[0] << 32) | state[1])


def random_state_of(rank: int, states: Sequence[RandomState]) -> RandomState:
    """A rank's own random state; a rank that had none yet gets one that no other rank has."""
    if rank < len(states):
        return states[rank]
    digest = hashlib.sha256(repr((states[0], rank)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Whatever draws random numbers in this block, the run's own, of dropout, do not depend on it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)

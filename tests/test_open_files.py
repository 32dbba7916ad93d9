"""A process that may open few files can still import mlx-lm, and one that may open many keeps them."""

from __future__ import annotations

import pytest

from orpo_mlx._open_files import bounded

FILES = 7


class Limits:
    """The kernel's rule: nobody may raise the highest, and none may ask for more than it."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def get(self, which: int) -> tuple[int, int]:
        assert which == FILES
        return self.now

    def set(self, which: int, limits: tuple[int, int]) -> None:
        soft, hard = limits
        highest = self.now[1]
        if which == FILES and highest >= 0 and (hard > highest or hard < 0 or soft > hard or soft < 0):
            raise ValueError("not allowed to raise maximum limit")
        self.now = limits


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 1024), (1024, 1024)),
        ((256, 1024), (1024, 1024)),
        ((256, 3000), (2048, 3000)),
        ((256, 1_048_576), (2048, 1_048_576)),
        ((524_288, 524_288), (524_288, 524_288)),
        ((256, -1), (2048, -1)),
        ((-1, -1), (-1, -1)),
    ],
)
def test_what_mlx_lm_asks_for_on_import(before: tuple[int, int], after: tuple[int, int]) -> None:
    limits = Limits(*before)
    bounded(limits.set, limits.get, FILES)(FILES, (2048, 4096))
    assert limits.now == after

"""How large each tier is run: a quick exercise of minutes, a full one of a night."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from orpo_mlx.compare.exercise.contenders import CONTENDERS
from orpo_mlx.compare.exercise.halving import Round
from orpo_mlx.compare.exercise.task import Size, Task

_ALL = tuple(contender.name for contender in CONTENDERS)

# The first tier trains its whole grid to the end: a training takes seconds there, and halving would favour high rates,
# which are ahead early and leave the KL bound later.
QUICK_EXACT = Size(
    pairs=1024,
    batch_size=32,
    rates=(3e-4, 1e-3),
    rounds=(Round(4, 48),),
    looks=4,
    seeds=3,
    valid_prompts=128,
    test_prompts=64,
    samples=16,
    held_out=1024,
    shuffles=3,
    variants=("0 % flipped", "20 % flipped"),
    contenders=("orpo", "dpo", "sft"),
)
FULL_EXACT = Size(
    pairs=2048,
    batch_size=32,
    rates=(1e-4, 3e-4, 1e-3, 3e-3),
    rounds=(Round(16, 64),),
    looks=4,
    seeds=10,
    valid_prompts=128,
    test_prompts=256,
    samples=16,
    held_out=2048,
    shuffles=6,
    variants=("0 % flipped", "20 % flipped", "40 % flipped"),
    contenders=_ALL,
)
# Too small to say anything about methods: it shows that all of it runs, twice with the same result.
QUICK_OPEN = Size(
    pairs=16,
    batch_size=4,
    rates=(1e-4, 3e-4),
    rounds=(Round(2, 2), Round(1, 4)),
    looks=1,
    seeds=2,
    valid_prompts=6,
    test_prompts=8,
    samples=1,
    held_out=0,
    shuffles=0,
    variants=("clean",),
    contenders=("orpo", "dpo"),
)
FULL_OPEN = Size(
    pairs=180,
    batch_size=4,
    rates=(3e-5, 1e-4, 3e-4, 1e-3),
    rounds=(Round(16, 20), Round(4, 40)),
    looks=4,
    seeds=5,
    valid_prompts=30,
    test_prompts=60,
    samples=1,
    held_out=0,
    shuffles=0,
    variants=("clean", "25 % flipped", "80 % longer chosen"),
    contenders=_ALL,
)


class Extent(NamedTuple):
    """One size of the whole exercise."""

    exact: Size
    open: Size


EXTENTS: Mapping[str, Extent] = {"quick": Extent(QUICK_EXACT, QUICK_OPEN), "full": Extent(FULL_EXACT, FULL_OPEN)}


def make_tasks(extent: Extent) -> dict[str, Callable[[], Task]]:
    """The tiers by name; each is made when it is called, which takes a while.

    Raises:
        ConfigError: the second tier's scorer is not installed.
    """
    # Only now: the second tier needs a model and a package that the first does not.
    from orpo_mlx.compare.exercise.gold_task import GoldTask
    from orpo_mlx.compare.exercise.open_task import OpenTask, sentiment_scorer

    # A package that is missing is said now, and not after the first tier's hours.
    sentiment_scorer()
    return {"exact": lambda: GoldTask(extent.exact), "open": lambda: OpenTask(extent.open)}

"""How large each tier is run: a quick exercise of minutes, a full one of a night."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from orpo_mlx.compare.exercise.contenders import CONTENDERS
from orpo_mlx.compare.exercise.cost import Shapes
from orpo_mlx.compare.exercise.halving import Round
from orpo_mlx.compare.exercise.task import Size, Tier
from orpo_mlx.errors import ConfigError

_ALL = tuple(contender.name for contender in CONTENDERS)

# The first tier trains its whole grid to the end: a training takes seconds there, and halving would favour high rates,
# which are ahead early and leave the KL bound later.
QUICK_EXACT = Size(
    pairs=1024,
    batch_size=32,
    rates=(3e-4, 1e-3),
    rounds=(Round(4, 48),),
    looks=6,
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
    rates=(1.5e-4, 3e-4, 6e-4, 1.2e-3),
    rounds=(Round(24, 96),),
    looks=12,
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
    rounds=(Round(2, 2), Round(1, 4, 2)),
    looks=2,
    seeds=2,
    valid_prompts=6,
    test_prompts=8,
    samples=1,
    held_out=0,
    shuffles=0,
    variants=("clean",),
    contenders=("orpo", "dpo"),
    tuned_once=True,
    fixed_steps=True,
)
FULL_OPEN = Size(
    pairs=300,
    batch_size=4,
    rates=(1.5e-4, 3e-4, 6e-4),
    # Shorter ones first would favour high rates here as well.
    rounds=(Round(12, 16), Round(2, 16, 2)),
    looks=2,
    seeds=5,
    valid_prompts=40,
    test_prompts=60,
    samples=1,
    held_out=0,
    shuffles=0,
    variants=("clean", "25 % flipped", "80 % longer chosen"),
    contenders=_ALL,
    # A training takes minutes here, and in life nobody has clean gold to tune on twice.
    tuned_once=True,
    fixed_steps=True,
)


class Extent(NamedTuple):
    """One size of the whole exercise."""

    exact: Size
    open: Size


EXTENTS: Mapping[str, Extent] = {"quick": Extent(QUICK_EXACT, QUICK_OPEN), "full": Extent(FULL_EXACT, FULL_OPEN)}


class CostShapes(NamedTuple):
    """What costs are measured and predicted at."""

    peaks: Shapes
    """All of the full ones take nine minutes."""
    small: tuple[int, ...]
    """Tokens of a side that the default model's peak is predicted at."""
    large: tuple[int, ...]
    """The same of larger models."""


# A second copy of the weights comes nearest to twice the memory where sides are short: the quick one has those alone.
COST_SHAPES: Mapping[str, CostShapes] = {
    "quick": CostShapes(((64, 1),), (32,), (64,)),
    "full": CostShapes(((64, 1), (256, 1), (1024, 1), (256, 4)), (32, 128, 512), (64, 256)),
}


class Part(NamedTuple):
    """What of an extent is run; None: all of it."""

    tier: str | None = None
    """A field of `Extent`."""
    methods: tuple[str, ...] | None = None
    seeds: int | None = None


def part_of(extent: Extent, part: Part) -> Extent:
    """An extent with fewer methods or seeds.

    Raises:
        ConfigError: a method that is not among the extent's, or DPO or ORPO missing, which the claims are about.
    """
    sizes = extent._asdict()
    if part.methods is not None:
        # Of two tiers the smaller one may have fewer methods.
        every = list(
            dict.fromkeys(each for tier in sizes if tier in (part.tier or tier) for each in sizes[tier].contenders)
        )
        wrong = next((each for each in part.methods if each not in every), None)
        if wrong is not None:
            raise ConfigError(
                f"`methods` {wrong}: does not take part in this extent; expected some of {', '.join(every)}."
            )
        if not {"orpo", "dpo"} <= set(part.methods):
            raise ConfigError(f"`methods` {','.join(part.methods)}: must have orpo and dpo among them.")
    return Extent(**{tier: _part_of(size, part) for tier, size in sizes.items()})


def _part_of(size: Size, part: Part) -> Size:
    kept = tuple(each for each in size.contenders if part.methods is None or each in part.methods)
    return size._replace(contenders=kept, seeds=part.seeds or size.seeds)


def tiers_of(extent: Extent, tier: str | None = None) -> dict[str, Tier]:
    """The tiers by name, or one.

    Raises:
        ConfigError: the second tier's scorer is not installed.
    """
    return {name: make_tier(name, size) for name, size in extent._asdict().items() if name == (tier or name)}


def make_tier(name: str, size: Size) -> Tier:
    """The tier of a name, in a size.

    Raises:
        ConfigError: its scorer is not installed.
    """
    # Only now: the second tier needs a model and a package that the first does not.
    from orpo_mlx.compare.exercise.gold_task import GoldTask
    from orpo_mlx.compare.exercise.open_task import OpenTask, sentiment_scorer

    if name == "exact":
        return Tier(size, GoldTask.bound, lambda cells: GoldTask(size))
    # A package that is missing is said now, and not after the first tier's hours.
    sentiment_scorer()
    return Tier(size, OpenTask.bound, lambda cells: OpenTask(size, cells))


def size_from(record: Mapping[str, Any]) -> Size:
    """A size that went through JSON."""
    found: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    found["rounds"] = tuple(Round(*each) for each in record["rounds"])
    return Size(**found)

"""What a tier of the exercise has to provide, and how large it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from orpo_mlx.compare.exercise.cells import Cells
from orpo_mlx.compare.exercise.halving import Round
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.training.references.reference_store import ReferenceTable
from orpo_mlx.types import TokenizedPair

PerPrompt = Mapping[str, Sequence[float]]
"""Measures of a model, a value for each prompt: `gold` (the reward) and `kl` (nats per reply) among them."""


class Size(NamedTuple):
    """How large a tier is run."""

    pairs: int
    """To train on."""
    batch_size: int
    rates: tuple[float, ...]
    rounds: tuple[Round, ...]
    """Of the tuning; the last one's steps are those of the final trainings."""
    looks: int
    """Times a final training is looked at, evenly spread over its steps, besides where a shorter one ends; those are
    looked at in the same steps."""
    seeds: int
    valid_prompts: int
    test_prompts: int
    samples: int
    """Replies to each test prompt."""
    held_out: int
    """Labelled pairs that nothing is trained on, for the methods' own rewards."""
    shuffles: int
    """Of the labels, each trained on with its mirror image, for each method; 0: no sanity checks."""
    variants: tuple[str, ...]
    contenders: tuple[str, ...]
    tuned_once: bool = False
    """Whether the settings that were found on the first variant are those of the others."""
    fixed_steps: bool = False
    """Whether tuning chooses the number of steps as well, so that final trainings need no look at valid prompts: they
    are looked at on the test prompts alone. Otherwise each final training is worth its best step by valid."""


class Task(Protocol):
    """A tier: a model, pairs of its own replies, and a reward that no method sees."""

    name: str
    loaded: LoadedModel
    size: Size
    bound: float
    """The largest KL to the base model, nats per reply."""
    kl_targets: tuple[float, ...]
    """KLs at which final trainings are compared as well, rising."""

    def shared(self) -> TrainingConfig:
        """The settings that hold for all methods."""

    def train_pairs(self, variant: str) -> list[TokenizedPair]:
        """What is trained on, with the labels of a variant."""

    def reference_table(self, variant: str) -> ReferenceTable | None:
        """Log-probs of a variant's pairs under the base model, for all trainings; None: each computes its own."""

    def held_out_pairs(self) -> list[TokenizedPair]:
        """Pairs labelled by the reward itself; the base model prefers the chosen side in exactly half of them."""

    def look(self, split: str) -> PerPrompt:
        """Measures of the model as it is, on the prompts of "valid" or "test"."""

    def besides(self) -> PerPrompt:
        """What else is measured of a final training where it is judged; not a value for each prompt."""

    def replies(self) -> list[dict[str, str]]:
        """Some of what the model said when it was last looked at: `prompt` and `reply`."""

    def facts(self) -> dict[str, Any]:
        """What a reader has to know of the data."""


class Tier(NamedTuple):
    """A task that is not made yet."""

    size: Size
    bound: float
    """The task's."""
    make: Callable[[Cells], Task]
    """Makes it, with what it keeps in the cells; takes a while."""

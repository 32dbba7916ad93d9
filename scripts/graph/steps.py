"""Training steps to count: this package's own, on models of well-known shapes whose weights take no memory."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.models.known_shapes import LLAMA_3_2_3B, QWEN3_4B, SMOLLM2_135M
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.training.prepare import assemble
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.training.steps.step_functions import traced_at_once
from orpo_mlx.types import TokenizedPair
from scripts.graph.count import counting
from scripts.graph.walker import zeros

MODELS = {"SmolLM2-135M": SMOLLM2_135M, "Llama-3.2-3B": LLAMA_3_2_3B, "Qwen3-4B": QWEN3_4B}
"""Settings of models, by name."""
GROUP_SIZE = 64

_SMALLEST_VOCABULARY = 1000


class Workload(NamedTuple):
    """What one step trains on."""

    model: str
    """One of `MODELS`."""
    dtype: mx.Dtype
    bits: int | None
    """Of quantised weights, in groups of 64; None where they are of `dtype`."""
    pairs: int
    prompt: int
    """Tokens of the longest prompt."""
    completion: int
    """Tokens of the longest completion."""

    @property
    def title(self) -> str:
        """One line for a table."""
        weights = f"{self.bits}-bit" if self.bits else str(self.dtype).rpartition(".")[2]
        return f"{self.model} {weights}, {self.pairs} x ({self.prompt} + {self.completion})"


WORKLOADS = (
    Workload("SmolLM2-135M", mx.float32, None, 2, 400, 300),
    Workload("SmolLM2-135M", mx.bfloat16, None, 2, 400, 300),
    Workload("Llama-3.2-3B", mx.bfloat16, 4, 2, 512, 512),
    Workload("Qwen3-4B", mx.bfloat16, 4, 1, 1024, 1024),
)


def empty_model(settings: dict[str, Any], dtype: mx.Dtype, bits: int | None = None) -> nn.Module:
    """A frozen model of the given shape, whose zeros take the memory of one number each."""
    model_class, arguments = _get_classes(settings)
    model: nn.Module = model_class(arguments.from_dict(settings))
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
    # Nothing has been drawn or quantised yet: MLX would do so when the numbers are wanted.
    model.update(tree_map(lambda array: zeros(array.shape, array.dtype), model.parameters()))
    model.freeze()
    return model


def sample_pairs(workload: Workload) -> list[TokenizedPair]:
    """Pairs of random tokens, of slightly different lengths."""
    draw = random.Random(0)
    longest = workload.completion

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, _SMALLEST_VOCABULARY) for _ in range(count))

    return [
        TokenizedPair(tokens(workload.prompt - 17 * i), tokens(longest - 5 * i), tokens(longest - 9 * i))
        for i in range(workload.pairs)
    ]


def training_step(config: TrainingConfig, model: nn.Module, pairs: Sequence[TokenizedPair]) -> Callable[[], Any]:
    """One optimiser step of this package on `pairs`, ready to be called; it returns what is left to be evaluated.

    Raises:
        UserError: the settings do not fit the model.
    """
    config = dataclasses.replace(config, batch_size=len(pairs))
    # Zeros agree with zeros: what is proven by numbers when a run is assembled is taken as proven. A compiled step is
    # counted: one whose shapes were met often before.
    with counting(walk=False), traced_at_once():
        run = assemble(config, Path(), {}, LoadedModel(model, None, {}, Path(), None, None))
    run.optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), run.optimizer.state)
    model.train()

    def step() -> Any:
        optimiser_step(run, pairs, 1)
        return model.trainable_parameters(), run.optimizer.state

    return step

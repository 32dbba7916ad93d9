"""Predicted memory of a training step, before a model's weights are loaded.

A step's peak grows by the same amount with every layer. So one real step is run, with all that this package does in
it, on two shallow models of the same widths with made-up weights, and the line through their peaks gives the peak at
full depth; bytes of weights are counted from the architecture. It needs no table of what
each architecture, setting and device keeps; it costs about as much as one step of a model of a dozen layers.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.batching import micro_batches, side_lengths
from orpo_mlx.engine.modes import MODES
from orpo_mlx.errors import ModelError, UntrainableError, reason_of
from orpo_mlx.memory.skeleton import Blueprint, build, read_blueprint, weight_bytes
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.process_memory import working_set_bytes
from orpo_mlx.training.prepare import assemble
from orpo_mlx.training.references.choose_reference import is_adapter, names_a_path
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.types import Example, TokenizedPair

_GIB = 2**30
_FEWEST_LAYERS, _FEWEST_OF_SEVERAL_KINDS = 2, 3
"""The first layer passes no gradient on and takes less: it may not be the only one of its kind."""
_NO_GRADIENT = "[Primitive::vjp] Not implemented for CustomKernel"
"""What MLX says where a kernel that a model brings along (`mx.fast.metal_kernel`) is to be differentiated."""
TOLERANCE = 0.1
"""How far, relative to it, a peak may be from its prediction."""


class Prediction(NamedTuple):
    """GiB at the peak of a training step, by what takes it."""

    weights: float
    adapters: float
    """The trained parameters, or 0 where they are the weights themselves."""
    optimiser: float
    activations: float
    """What grows with the number of layers: activations kept for the backward pass, gradients."""
    head: float
    """What does not: logits of a chunk, hidden states, the largest intermediate results."""
    reference: float
    """What computing reference log-probs takes beyond the step itself."""

    @property
    def peak(self) -> float:
        """Their sum."""
        return sum(self)


class Probe(NamedTuple):
    """Bytes that were measured on a model of some depth."""

    adapters: int
    optimiser: int
    work: int
    """The step's peak without weights, adapters and the optimiser's state."""
    reference: int


def predict(config: TrainingConfig, blueprint: Blueprint, window: Sequence[Example]) -> Prediction:
    """The peak of MLX's memory in a step on the heaviest micro-batches of `window`. Draws random numbers.

    `config.memory` "auto" is taken as "fast".

    Raises:
        UserError: the model cannot be built, or the settings do not fit it.
    """
    if config.memory == "auto":
        config = dataclasses.replace(config, memory="fast")
    total = blueprint.layers
    trained = total if config.num_layers == -1 else config.num_layers
    # Depths at which the pattern of layers, the segments and the share of kept layers come out even.
    # Shares of layers are written as decimals with one digit: 0.4 is 2/5, not the binary fraction that is stored.
    kept_share = Fraction(MODES[config.memory].kept_layers).limit_denominator(10)
    even = lcm(blueprint.period, config.segment_layers or 1, kept_share.denominator)
    fewest = _FEWEST_LAYERS if blueprint.period == 1 else _FEWEST_OF_SEVERAL_KINDS
    shallow = even * -(-fewest // even)
    # A pattern twice: whatever repeats in the shallow one repeats in the deep one.
    deep = shallow + (even if blueprint.period == 1 else shallow)
    if trained <= deep or trained > total:
        # More than there are is for the probe to refuse, as the run would.
        depth = min(max(trained, shallow), total)
        # Few layers learn: the real number is small enough to be run itself.
        found, per_layer = _probe(config, blueprint, depth, trained, window), Probe(0, 0, 0, 0)
    else:
        small, large = (_probe(config, blueprint, depth, depth, window) for depth in (shallow, deep))
        per_layer = Probe(*((b - a) // (deep - shallow) for a, b in zip(small, large, strict=True)))
        found = Probe(*(b + (trained - deep) * step for b, step in zip(large, per_layer, strict=True)))
    mx.clear_cache()
    # Buffers that MLX reuses make small differences negative: a part is never below nothing.
    activations = max(0, min(trained * per_layer.work, found.work))
    reference = max(found.reference, 0) + other_model_bytes(config)
    parts = (found.adapters, found.optimiser, activations, found.work - activations, reference)
    return Prediction(weight_bytes(build(blueprint, total)) / _GIB, *(part / _GIB for part in parts))


def other_model_bytes(config: TrainingConfig) -> int:
    """Bytes of the weights of another model that the run compares with; adapters count as nothing."""
    if not names_a_path(config) or is_adapter(Path(config.reference).expanduser()):
        return 0
    blueprint = read_blueprint(config.reference, dtype=config.dtype)
    return weight_bytes(build(blueprint, blueprint.layers))


def heaviest_window(config: TrainingConfig, pairs: Sequence[Example]) -> list[Example]:
    """The longest pairs of a split, as many as an optimiser step takes."""
    # Stable, so that equal lengths give the same pairs on every machine.
    longest = np.argsort(side_lengths(pairs).sum(axis=1), kind="stable")[::-1][
        : config.batch_size * config.grad_accumulation_steps
    ]
    return [pairs[index] for index in longest.tolist()]


def made_window(config: TrainingConfig, prompt_tokens: int, vocabulary: int) -> list[Example]:
    """A step's pairs, each side `config.max_seq_length` tokens long, of which `prompt_tokens` are the prompt."""
    # Ids are random because equal ones would be one row of a gathered embedding, and experts would all be the same.
    rng = np.random.default_rng(0)
    completion_tokens = config.max_seq_length - prompt_tokens

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, length).tolist())

    count = config.batch_size * config.grad_accumulation_steps
    return [TokenizedPair(ids(prompt_tokens), ids(completion_tokens), ids(completion_tokens)) for _ in range(count)]


def heaviest_two(config: TrainingConfig, cuts: Sequence[list[Example]]) -> list[Example]:
    """The examples of the last two micro-batches, since the first one's gradient is held while the second is computed.

    The first is made of single tokens where that takes time off and leaves the second as it is: gradients are as large.
    """
    if len(cuts) < 2:
        return list(cuts[-1])
    light = [brief(example) for example in cuts[-2]]
    for first in (light, cuts[-2]):
        pairs = [*first, *cuts[-1]]
        if micro_batches(pairs, config.batch_size, config.micro_batch_tokens)[1:] == [cuts[-1]]:
            break
    return pairs


def brief(example: Example) -> Example:
    """The last token of each of its completions after the first of its prompt."""
    prompt = example.prompt_ids[:1]
    ends = tuple(ids[-1:] for ids in example.completions)
    if isinstance(example, TokenizedPair):
        return example._replace(prompt_ids=prompt, chosen_ids=ends[0], rejected_ids=ends[1])
    return example._replace(prompt_ids=prompt, completions=ends)


def recommended_working_set(memory_gib: float) -> float:
    """GiB of a Mac's memory that Metal recommends to use at most: two thirds up to 32 GiB, three quarters above.

    From Metal's `recommendedMaxWorkingSetSize` as users of llama.cpp report it: 10,922.67 MiB of 16 GiB
    (ggml-org/llama.cpp issue 2209), 49,152 MiB of 64 GiB (issue 1870). Newer systems are reported with more, 11.84 of
    16 GiB and 107.5 of 128 GiB; this is the lower figure. `sysctl iogpu.wired_limit_mb` can raise it.
    """
    return memory_gib * (2 / 3 if memory_gib <= 32 else 3 / 4)


def device_working_set() -> float | None:
    """GiB this device recommends, or None where it does not say."""
    size = working_set_bytes()
    return None if size is None else size / _GIB


def _probe(config: TrainingConfig, blueprint: Blueprint, depth: int, trained: int, window: Sequence[Example]) -> Probe:
    """One step on a model of `depth` layers, of which the last `trained` learn."""
    try:
        return _measured_step(config, blueprint, depth, trained, window)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if _NO_GRADIENT in str(error):
            raise UntrainableError(
                f"{config.model}: a layer of it runs a kernel of mlx-lm that has no gradient on this device "
                f"({reason_of(error)}), so it cannot be trained here; take a model of another architecture."
            ) from error
        raise ModelError(f"a model like this one with {depth} layers cannot be run ({reason_of(error)}).") from error


def _measured_step(
    config: TrainingConfig, blueprint: Blueprint, depth: int, trained: int, window: Sequence[Example]
) -> Probe:
    # Compiled functions and what they belong to refer to each other: a model that was dropped may still be there.
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = build(blueprint, depth)
    # Weights are made now: made within the step they would count as its work.
    mx.eval(model.parameters())
    loaded = LoadedModel(model, None, blueprint.config, Path(), None, None)
    # Another model's weights are counted, not loaded.
    reference = "start" if names_a_path(config) else config.reference
    config = dataclasses.replace(config, num_layers=trained, resume_adapter_file=None, reference=reference)
    run = assemble(config, Path(), {}, loaded)
    # Its moments would otherwise be made in the step, and be counted twice.
    run.optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), run.optimizer.state)
    model.train()
    cuts = micro_batches(window, config.batch_size, config.micro_batch_tokens)
    pairs = heaviest_two(config, cuts)
    reference_peak = 0
    if run.reference is not None:
        mx.reset_peak_memory()
        run.reference.remember(cuts[-1:])
        reference_peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    optimiser_step(run, pairs, 1)
    peak = mx.get_peak_memory()
    learning = sum(array.nbytes for array in adapter_weights(model).values())
    weights = weight_bytes(model)
    state = sum(array.nbytes for array in dict(tree_flatten(run.optimizer.state)).values())
    adapters = 0 if config.fine_tune_type == "full" else learning
    return Probe(adapters, state, peak - before - weights - state, max(reference_peak - peak, 0))

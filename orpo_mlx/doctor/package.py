"""Everything that the doctor calls of the engine: models, runs, steps, and the functions that replace mlx-lm's.

The checks know the engine by this module alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.device_profile import device_profile
from orpo_mlx.engine.head_logps import head_logps, trained_head_logps
from orpo_mlx.engine.modes import MODES
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.memory.predict import predict
from orpo_mlx.memory.skeleton import Blueprint, build
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from orpo_mlx.models.known_shapes import LLAMA_3_2_3B, SMOLLM2_135M
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.training.prepare import assemble
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.training.steps.step_functions import traced_at_once
from orpo_mlx.types import TokenizedPair

MEMORY_MODES = tuple(MODES)
"""Values of `--memory`, `plain` among them."""

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 8192}


def _shape(hidden: int, layers: int, inner: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }


SHAPES = {
    # Heads of 64, which MLX's fused attention takes.
    "tiny": _shape(128, 3, 256, 2, 1, 2304),
    # More than one tile of the head, whatever the device.
    "tiny, large vocabulary": _shape(128, 1, 256, 2, 1, 17408),
    "SmolLM2-135M": SMOLLM2_135M,
    "SmolLM2-135M, 6 of 30 layers": SMOLLM2_135M | {"num_hidden_layers": 6},
    "Llama-3.2-3B, 4 of 28 layers": LLAMA_3_2_3B | {"num_hidden_layers": 4},
}
"""config.json of models by name; their weights are random."""

_LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
_RATE = 1e3
"""Learning rate of the step that shows gradients: weights are then small beside what the step takes from them."""


def blueprint(shape: str, dtype: str, *, quantised: bool = False) -> Blueprint:
    """What `build` and `predict` need for a shape; `quantised` is 4 bits in groups of 64, but for the embedding."""
    config = dict(SHAPES[shape])
    layers = config["num_hidden_layers"]
    plain = Blueprint(config, layers, 1, getattr(mx, dtype), frozenset())
    if not quantised:
        return plain
    config["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"}
    names = frozenset(name for name, module in build(plain, 1).named_modules() if isinstance(module, nn.Linear))
    numbers = range(layers)
    return plain._replace(quantised=frozenset(n.replace(".0.", f".{number}.") for n in names for number in numbers))


def make_model(shape: str, dtype: str, *, quantised: bool = False) -> nn.Module:
    """A model of one of `SHAPES`; the tiny one's weights are the same numbers on every machine."""
    plan = blueprint(shape, dtype, quantised=quantised)
    if not shape.startswith("tiny"):
        mx.random.seed(0)
        model = build(plan, plan.layers)
    else:
        model = build(plan._replace(quantised=frozenset(), dtype=mx.float32), plan.layers)
        _set_weights(model)
        if quantised:
            nn.quantize(model, 64, 4, class_predicate=lambda name, _: name in plan.quantised)
        model.set_dtype(plan.dtype)
    mx.eval(model.parameters())
    return model


def _set_weights(model: nn.Module) -> None:
    rng = np.random.default_rng(7)
    weights = []
    for name, array in dict(tree_flatten(model.parameters())).items():
        # Wider than initialisers draw, so that logits and gradients are far from trivial.
        spread = 1.7 * array.shape[-1] ** -0.5
        values = rng.uniform(-spread, spread, array.shape) if array.ndim == 2 else np.ones(array.shape)
        weights.append((str(name), mx.array(values.astype(np.float32))))
    model.load_weights(weights)


def made_pairs(lengths: Sequence[tuple[int, int, int]], shape: str = "tiny") -> list[TokenizedPair]:
    """Random pairs with so many tokens of prompt, chosen and rejected, the same on every machine."""
    rng, vocabulary = np.random.default_rng(1), SHAPES[shape]["vocab_size"]

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, vocabulary, length).tolist())

    return [
        TokenizedPair(ids(prompt), ids(chosen), ids(rejected), f"pair {number}")
        for number, (prompt, chosen, rejected) in enumerate(lengths, 1)
    ]


def settings_of(memory: str, pairs: int, **settings: Any) -> TrainingConfig:
    """Settings of a step of so many pairs."""
    return dataclasses.replace(
        TrainingConfig(), memory=memory, batch_size=pairs, lora_parameters=_LORA, memory_check=False, **settings
    )


def make_run(model: nn.Module, memory: str, pairs: int, **settings: Any) -> Run:
    """A run on a model without adapters, which get values that are the same on every machine."""
    config = settings_of(memory, pairs, **settings)
    # Compiled functions are to be proven and timed, in a few steps of one shape.
    with traced_at_once():
        run = assemble(config, Path(), {}, LoadedModel(model, None, {}, Path(), None, None))
    set_adapters(model)
    run.optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), run.optimizer.state)
    model.train()
    return run


def with_lora(model: nn.Module) -> nn.Module:
    """The model with the adapters that `make_run` adds, in training mode."""
    add_adapters(model, "lora", -1, _LORA)
    set_adapters(model)
    model.train()
    return model


def adapter_values(model: nn.Module) -> dict[str, mx.array]:
    """Values for a model's adapters, none of them zero: where B is zero, A has no gradient."""
    rng = np.random.default_rng(11)
    values = {}
    for name, array in adapter_weights(model).items():
        spread = array.shape[0] ** -0.5 * (1.0 if name.endswith("lora_a") else 0.05)
        values[name] = mx.array(rng.uniform(-spread, spread, array.shape).astype(np.float32)).astype(array.dtype)
    return values


def set_adapters(model: nn.Module) -> None:
    """Give the adapters their values."""
    model.load_weights(list(adapter_values(model).items()), strict=False)
    mx.eval(model.parameters())


def step_once(run: Run, pairs: Sequence[TokenizedPair], number: int = 1) -> dict[str, float]:
    """One optimiser step; its metrics."""
    return optimiser_step(run, pairs, number).means()


def loss_and_gradients(
    model: nn.Module, memory: str, pairs: Sequence[TokenizedPair], method: str
) -> tuple[float, dict[str, mx.array]]:
    """A step's loss and gradients under `--memory`, as the step itself applies them.

    The step is one of plain gradient descent with a large rate, and what it takes from the weights is divided by that
    rate: so all that a step is made of is in it.
    """
    with _adapted(model):
        run = make_run(model, memory, len(pairs), method=method, optimizer="sgd", learning_rate=_RATE)
        before = {name: array + 0 for name, array in adapter_weights(model).items()}
        mx.eval(before)
        loss = step_once(run, pairs)["loss"]
        after = adapter_weights(model)
        gradients = {name: (before[name] - after[name]).astype(mx.float32) / _RATE for name in before}
        mx.eval(gradients)
    return loss, gradients


def notes_of(model: nn.Module, memory: str) -> tuple[str, ...]:
    """What a run on this model says of the paths that its mode has and that are off."""
    with _adapted(model):
        return make_run(model, memory, 1).memory.notes


@contextmanager
def _adapted(model: nn.Module) -> Iterator[None]:
    """Adapters that are added within the block are off the model after it."""
    base = model.leaf_modules()
    try:
        yield
    finally:
        model.update_modules(base)
        model.freeze()


def predicted_peak(shape: str, dtype: str, memory: str, pairs: Sequence[TokenizedPair], *, quantised: bool) -> float:
    """GiB that `fit` predicts for a step on these pairs; before a model is made, as `fit` does."""
    return predict(settings_of(memory, len(pairs)), blueprint(shape, dtype, quantised=quantised), pairs).peak


@contextmanager
def functions_in_place() -> Iterator[None]:
    """Within the block, what mlx-lm's layers call is what the package puts in its place: llama's and Qwen3.5's."""
    with ExitStack() as stack:
        for scorer in _scorers():
            stack.enter_context(scorer.layers())
        yield


@cache
def _scorers() -> tuple[PairScorer, ...]:
    return tuple(map(PairScorer, (make_model("tiny", "float32"), recurrent_model())))


def find_head(model: nn.Module) -> Any:
    """A model's head, as the package tells it apart from the layers.

    Raises:
        ValueError: it does not.
    """
    head = PairScorer(model).head
    if head is None:
        raise ValueError("the head of a llama could not be told apart from its layers")
    return head


def frozen_head_logps(head: Any, hidden: mx.array, targets: mx.array) -> mx.array:
    """Log-probs (N,) of targets (N,) from states (N, H), with a gradient to the states."""
    return head_logps(head, hidden, targets, profile=device_profile())


def learning_head_logps(head: Any, hidden: mx.array, targets: mx.array) -> mx.array:
    """The same where the head itself is trained, with gradients to its parameters as well."""
    return trained_head_logps(head, hidden, targets, profile=device_profile())


def recurrent_model() -> Any:
    """A model with layers of the gated delta rule, as small as may be."""
    kinds = {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_conv_kernel_dim": 4}
    widths = dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 64)
    own = {"model_type": "qwen3_5_text", "partial_rotary_factor": 0.5, "full_attention_interval": 2}
    inner = {**_shape(64, 2, 64, 2, 1, 64), **kinds, **widths, **own}
    config = {"model_type": "qwen3_5", "vocab_size": 64, "text_config": inner}
    model = build(Blueprint(config, 2, 2, mx.float32, frozenset()), 2)
    mx.eval(model.parameters())
    return model

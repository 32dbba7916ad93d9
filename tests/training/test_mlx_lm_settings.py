"""Every optimiser, schedule and way to fine-tune that mlx_lm.lora has, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import build_schedule, load_adapters
from mlx_lm.utils import load_model, save_model

from orpo_mlx.config.checks import check_settings, make_config
from orpo_mlx.config.defaults import OPTIMIZERS
from orpo_mlx.errors import ConfigError
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.steps.gradients import step_gradient
from orpo_mlx.training.steps.step import optimiser_step
from tests.conftest import make_model, model_config, quantise
from tests.helpers.quiet_training import run_quietly
from tests.training.evaluating.test_evaluate_only import lines_of

CLASSES = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_steps_are_those_of_mlxs_optimiser(settings: dict[str, Any], optimizer: str) -> None:
    """The same two gradients given to the optimiser that mlx has under this name."""
    config = make_config({**settings, "optimizer": optimizer})
    run, other = prepare(config), prepare(config)
    start = {name: np.array(value) for name, value in adapter_weights(run.loaded.model).items()}
    theirs = CLASSES[optimizer](learning_rate=1e-3, **config.optimizer_config[optimizer])
    pairs = run.splits["train"].pairs
    for step in (1, 2):
        step_batch = [pairs[2 * step], pairs[2 * step + 1]]
        optimiser_step(run, step_batch, step)
        gradients = step_gradient(other, step_batch).gradients
        theirs.update(other.loaded.model, tree_unflatten(list(gradients.items())))
    expected = adapter_weights(other.loaded.model)
    for name, value in adapter_weights(run.loaded.model).items():
        np.testing.assert_array_equal(np.array(value), np.array(expected[name]), err_msg=name)
        assert not np.array_equal(np.array(value), start[name]), name


def test_the_optimisers_are_those_of_mlx_lm() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    theirs: Any = CONFIG_DEFAULTS["optimizer_config"]
    assert set(OPTIMIZERS) == set(theirs) == set(CLASSES)


SCHEDULES = {
    "cosine_decay": [1e-3, 4, 1e-5],
    "exponential_decay": [1e-3, 0.5],
    "linear_schedule": [1e-3, 1e-5, 4],
    "step_decay": [1e-3, 0.5, 2],
}


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_is_the_schedules(settings: dict[str, Any], name: str, warmup: int) -> None:
    schedule = {"name": name, "arguments": SCHEDULES[name], "warmup": warmup, "warmup_init": 1e-6}
    run_quietly({**settings, "iters": 6, "lr_schedule": schedule, "val_batches": 0, "test_batches": 0})
    rates = [row["learning_rate"] for row in lines_of(Path(settings["adapter_path"]) / "metrics.jsonl")]
    theirs = build_schedule(schedule)
    # The first step is taken at the schedule's step 0.
    assert rates == pytest.approx([float(theirs(mx.array(step))) for step in range(6)], rel=1e-6)
    assert len(set(rates)) > 2
    assert (rates[0] == pytest.approx(1e-6)) == (warmup > 0)


def test_every_schedule_of_mlx_is_tried() -> None:
    functions = {name for name in vars(optim.schedulers) if name.endswith(("_decay", "_schedule"))}
    assert functions == set(SCHEDULES)


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """A tiny llama in 4 bits, without a tokenizer."""
    model = make_model()
    quantise(model)
    (tmp_path / "quantised").mkdir()
    save_model(tmp_path / "quantised", model)
    config = {**model_config("llama"), "quantization": {"group_size": 32, "bits": 4}}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    return tmp_path / "quantised"


def logits_of(model: nn.Module) -> Any:
    return np.array(model(mx.array([[3, 4, 5, 6]])))


ALL = {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"}


LORA: list[tuple[dict[str, Any], set[int], set[str]]] = [
    ({}, {0, 1}, ALL),
    ({"fine_tune_type": "dora"}, {0, 1}, ALL),
    ({"num_layers": 1}, {1}, ALL),
    ({"lora_parameters": {"keys": ["self_attn.q_proj"], "rank": 3}}, {0, 1}, {"self_attn.q_proj"}),
]
FULL: list[tuple[dict[str, Any], set[int], set[str]]] = [
    ({"fine_tune_type": "full"}, {0, 1}, ALL),
    ({"fine_tune_type": "full", "num_layers": 1}, {1}, ALL),
]


@pytest.mark.parametrize(
    ("bits", "changes", "layers", "modules"),
    [*((None, *each) for each in (*LORA, *FULL)), *((4, *each) for each in LORA)],
)
def test_what_is_trained_is_what_was_asked_for_and_mlx_lm_runs_it(
    settings: dict[str, Any],
    quantised: Path,
    bits: int | None,
    changes: dict[str, Any],
    layers: set[int],
    modules: set[str],
) -> None:
    if bits:
        settings["model"] = str(quantised)
    run_quietly({**settings, **changes, "iters": 2, "learning_rate": 1e-2, "method": "dpo"})
    weights: Any = mx.load(str(Path(settings["adapter_path"]) / "adapters.safetensors"))
    names = [name.split(".") for name in weights]
    assert {int(parts[2]) for parts in names} == layers
    found = {".".join(parts[3:5]) for parts in names}
    assert modules <= found
    assert modules == ALL or found == modules
    losses = [row["loss"] for row in lines_of(Path(settings["adapter_path"]) / "metrics.jsonl")]
    assert np.isfinite(losses).all()
    base = load_model(Path(settings["model"]))[0]
    before = logits_of(base)
    tuned = load_adapters(load_model(Path(settings["model"]))[0], settings["adapter_path"])
    assert not np.allclose(logits_of(tuned), before, atol=1e-3)
    # The frozen weights stay in 4 bits.
    kinds = {value.dtype for _, value in dict(tree_flatten(tuned.parameters())).items()}
    assert (mx.uint32 in kinds) == bool(bits)


def test_quantised_weights_cannot_be_trained_themselves(settings: dict[str, Any], quantised: Path) -> None:
    with pytest.raises(ConfigError, match="`fine_tune_type=full`: this model's weights are quantised"):
        run_quietly({**settings, "model": str(quantised), "fine_tune_type": "full"})


@pytest.mark.parametrize(("threshold", "empty"), [(None, False), ("4GB", False), (0, True)])
def test_a_step_leaves_no_more_in_the_cache_than_was_asked_for(
    settings: dict[str, Any], threshold: str | int | None, empty: bool
) -> None:
    run = prepare(make_config({**settings, **check_settings({"clear_cache_threshold": threshold}, "test")}))
    optimiser_step(run, run.splits["train"].pairs[:2], 1)
    assert (mx.get_cache_memory() == 0) == empty

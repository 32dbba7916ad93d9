"""LoRA+: which parameters learn faster, and by how much."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.config.checks import make_config
from orpo_mlx.config.defaults import OPTIMIZER_ARGUMENTS
from orpo_mlx.errors import ConfigError
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.training.optimizers import _OPTIMIZERS, is_faster, make_optimizer, set_learning_rate
from tests.helpers.quiet_training import flags, make_run
from tests.training.checkpoints.test_resume import LONG, assert_same, whole_and_resumed

# The groups of PEFT 0.21's create_loraplus_optimizer(lr=1e-3, loraplus_lr_ratio=16) on a LoRA and a DoRA model: lora_A
# at 1e-3; lora_B and lora_magnitude_vector at 0.016; all with its weight decay.
PEFTS = {"lora_a": False, "lora_b": True, "m": True}


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
def test_the_faster_parameters_are_pefts(settings: dict[str, Any], fine_tune_type: str) -> None:
    names = adapter_weights(make_run(settings, fine_tune_type=fine_tune_type).loaded.model)
    assert {name.rpartition(".")[2]: is_faster(name) for name in names} == {
        leaf: faster for leaf, faster in PEFTS.items() if fine_tune_type == "dora" or leaf != "m"
    }


@pytest.mark.parametrize("schedule", [None, {"name": "linear_schedule", "arguments": [1e-2, 1e-3, 4]}])
def test_steps_are_adamws_with_a_rate_each(settings: dict[str, Any], schedule: dict[str, Any] | None) -> None:
    """Against AdamW's equations in float64 (Loshchilov and Hutter 2019, algorithm 2)."""
    decay = {"adamw": {"weight_decay": 0.1}}
    config = make_config(
        {"learning_rate": 1e-2, "lr_schedule": schedule, "lora_plus_ratio": 16.0, "optimizer_config": decay}
    )
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(3, 4)) for name in ("lora_a", "lora_b")}
    tree: dict[str, Any] = {"q": {name: mx.array(array.astype(np.float32)) for name, array in weights.items()}}
    optimizer.init(tree)
    moments: dict[str, tuple[Any, Any]] = dict.fromkeys(weights, (0.0, 0.0))
    for step in range(1, 4):
        rate = 1e-2 if schedule is None else 1e-2 + (step - 1) / 4 * (1e-3 - 1e-2)
        gradients = {name: rng.normal(size=(3, 4)) for name in weights}
        tree = optimizer.apply_gradients(
            {"q": {name: mx.array(gradient.astype(np.float32)) for name, gradient in gradients.items()}}, tree
        )
        for name, gradient in gradients.items():
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[name] = first, second
            own = rate * (16 if name == "lora_b" else 1)
            change = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            weights[name] = weights[name] * (1 - own * 0.1) - own * change
            np.testing.assert_allclose(np.array(tree["q"][name]), weights[name], rtol=1e-4, atol=1e-5)


def test_the_arguments_that_are_taken_are_mlxs() -> None:
    for name, make in _OPTIMIZERS.items():
        assert ["learning_rate", *OPTIMIZER_ARGUMENTS[name]] == [*inspect.signature(make).parameters], name


def test_a_schedule_whose_rates_are_none() -> None:
    config = make_config({"iters": 99, "lr_schedule": {"name": "exponential_decay", "arguments": [1e-3, 10.0]}})
    with pytest.raises(ConfigError, match=r"^lr_schedule: .*is not a schedule of mlx-lm .*rate at step 99 is inf"):
        make_optimizer(config)


def test_a_rate_that_is_set_keeps_the_ratio() -> None:
    config = make_config({"learning_rate": 0.5, "lora_plus_ratio": 4.0})
    optimizer = make_optimizer(config)
    optimizer.learning_rate = 0.1
    set_learning_rate(optimizer, config)
    assert isinstance(optimizer, optim.MultiOptimizer)
    assert [float(each.learning_rate) for each in optimizer.optimizers] == [0.5, 2.0]


def test_resumed_it_is_the_run_it_would_have_been(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_same(*whole_and_resumed({**settings, **LONG, "lora_plus_ratio": 8.0, "optimizer": "adam"}, tmp_path, [4]))


def test_full_weights_have_no_second_factor() -> None:
    with pytest.raises(ConfigError, match="`lora_plus_ratio` is about lora_b"):
        make_config({"lora_plus_ratio": 2.0, "fine_tune_type": "full"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr_schedule: {name: no_such}", "is not a schedule of mlx-lm"),
        ("lr_schedule: {name: cosine_decay, arguments: [fast, 3]}", "is not a schedule of mlx-lm"),
        ("lr_schedule: {arguments: [1]}", "is not a schedule of mlx-lm"),
        ("optimizer_config: {adamw: {momentums: 3}}", "optimizer_config.adamw"),
        ("optimizer: adamx", "did you mean"),
    ],
)
def test_a_config_that_does_not_fit_the_libraries(
    settings: dict[str, Any], tmp_path: Path, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    # As a flag it would take the place of the schedule.
    del settings["learning_rate"]
    assert main([*flags(settings), "-c", str(tmp_path / "config.yaml")]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1

"""The load-balancing loss of experts, against its equation in float64 and the model's own layers run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.device_profile import PROFILES, VARIABLE
from orpo_mlx.engine.router_loss import Routers, balance_loss
from orpo_mlx.errors import ConfigError
from orpo_mlx.training.steps.gradients import step_gradient
from orpo_mlx.types import Example
from tests.conftest import make_model, model_config, write_model_folder
from tests.helpers.quiet_training import make_run, rows, run_quietly

Array = npt.NDArray[np.float64]


def shares(logits: Array, experts_per_token: int) -> tuple[Array, Array]:
    """f, by counting, and P of Fedus et al. 2021, eq. 5 and 6."""
    counts = np.zeros(logits.shape[1])
    for row in logits:
        counts[sorted(range(len(row)), key=lambda expert: -row[expert])[:experts_per_token]] += 1
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return counts / len(logits), (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_value_and_gradient_are_the_equations(scale: float) -> None:
    rng = np.random.default_rng(0)
    logits = scale * rng.normal(size=(50, 6)).astype(np.float32).astype(np.float64)
    real = rng.random(50) < 0.7
    f, p = shares(logits[real], 2)
    loss, gradient = mx.value_and_grad(lambda x: balance_loss(x, mx.array(real), 2))(mx.array(logits, mx.float32))
    assert loss.item() == pytest.approx(6 * (f * p).sum(), rel=1e-6)
    # d P_e / d logit_j of one token is softmax_e (1[e = j] - softmax_j) over the number of tokens.
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = powers / powers.sum(axis=1, keepdims=True)
    expected = np.where(real[:, None], 6 * softmax * (f - (softmax * f).sum(axis=1, keepdims=True)) / real.sum(), 0)
    np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-5, atol=1e-8)


def test_experts_used_alike_cost_as_many_as_a_token_has() -> None:
    # Each expert is first once and second once.
    logits = 9.0 * mx.array([[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2.0]])
    assert balance_loss(logits, mx.ones(4, mx.bool_), 2).item() == pytest.approx(2, rel=1e-6)
    assert float(balance_loss(mx.array([[9.0, 8.0, 0, 0]] * 4), mx.ones(4, mx.bool_), 2)) > 3.9


def router_logits(model: Any, ids: list[int]) -> mx.array:
    """(layers · tokens, E): a Mixtral's router logits of one sequence, layer by layer without this package."""
    found, h = [], model.model.embed_tokens(mx.array([ids]))
    for layer in model.layers:
        h = h + layer.self_attn(layer.input_layernorm(h), "causal", None)
        x = layer.post_attention_layernorm(h)
        found.append(layer.block_sparse_moe.gate(x)[0])
        h = h + layer.block_sparse_moe(x)
    return mx.concatenate(found)


def of_pairs(model: Any, pairs: list[Example]) -> mx.array:
    """The same of both sides of some pairs, without the last token, which predicts nothing."""
    sides = [[*pair.prompt_ids, *ids[:-1]] for pair in pairs for ids in pair.completions]
    return mx.concatenate([router_logits(model, side) for side in sides])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ["orpo", "dpo", "aot", "kto"])
def test_a_step_adds_the_loss_of_all_its_tokens(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, profile: str
) -> None:
    monkeypatch.setenv(VARIABLE, profile)
    folder = write_model_folder(tmp_path / "mixtral", "mixtral")
    own = {"model": str(folder), "method": method, "memory": "plain", "batch_size": 6, "num_layers": 2}
    found = []
    for factor in (0.0, 0.5):
        run = make_run({**settings, **own}, router_aux_loss_coef=factor)
        found.append(step_gradient(run, run.splits["train"].pairs[:]))
    pairs = list(run.splits["train"].pairs[:])
    model: Any = run.loaded.model
    f, p = shares(np.array(of_pairs(model, pairs), np.float64), 2)
    means = found[1].means.means()
    assert means["aux_loss"] == pytest.approx(4 * (f * p).sum(), rel=1e-5)
    assert "aux_loss" not in found[0].means.means()
    assert means["loss"] == pytest.approx(found[0].means.means()["loss"], rel=1e-6)

    def loss(parameters: dict[str, Any]) -> mx.array:
        model.update(parameters)
        probabilities = mx.softmax(of_pairs(model, pairs), axis=-1).mean(axis=0)
        return 4 * (mx.array(f, mx.float32) * probabilities).sum()

    expected = dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))
    for name, gradient in expected.items():
        difference = (found[1].gradients[name] - found[0].gradients[name]) / 0.5
        scale = max(1e-3, float(mx.abs(gradient).max()))
        noise = 1e-6 * float(mx.abs(found[0].gradients[name]).max())
        np.testing.assert_allclose(np.array(difference), np.array(gradient), rtol=0, atol=1e-4 * scale + noise)


def test_micro_batches_weigh_by_their_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "mixtral", "mixtral")
    run = make_run(
        {**settings, "model": str(folder), "memory": "plain", "batch_size": 6, "micro_batch_tokens": 1},
        router_aux_loss_coef=0.1,
    )
    pairs = list(run.splits["train"].pairs[:])
    losses = []
    for pair in pairs:
        f, p = shares(np.array(of_pairs(run.loaded.model, [pair]), np.float64), 2)
        losses.append(4 * (f * p).sum())
    assert step_gradient(run, pairs).means.means()["aux_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_is_logged_and_balances_what_is_trained(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "mixtral", "mixtral")
    lora = {"keys": ["block_sparse_moe.gate"], "rank": 4, "scale": 4.0, "dropout": 0.0}
    run_quietly(
        {
            **settings,
            "model": str(folder),
            "memory": "plain",
            "router_aux_loss_coef": 100.0,
            "iters": 30,
            "batch_size": 6,
            "learning_rate": 1e-3,
            "lora_parameters": lora,
            "num_layers": 2,
            "steps_per_report": 1,
        }
    )
    logged = [row["aux_loss"] for row in rows(settings, "train")]
    assert len(logged) == 30
    assert logged[-1] - 2 < (logged[0] - 2) / 2, logged
    assert all("aux_loss" not in row for row in rows(settings, "valid"))


def test_where_it_cannot_be_it_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`router_aux_loss_coef`: this model has no experts"):
        make_run(settings, memory="plain", router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match=r"which `memory=fast` never has; add `memory=plain`"):
        make_run(settings, memory="fast", router_aux_loss_coef=0.1)


def test_routers_of_every_layer_are_found_whatever_is_trained() -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model: Any = make_model("mixtral")
    linear_to_lora_layers(model, 2, {"keys": ["block_sparse_moe.gate"], "rank": 2, "scale": 1.0, "dropout": 0.0})
    routers = Routers(model)
    ids = mx.array([[1, 2, 3]])
    with routers.recorded():
        model(ids)
    layers = model_config("mixtral")["num_hidden_layers"]
    assert routers.loss([mx.array([3])], [3]).item() == pytest.approx(
        balance_loss(router_logits(model, [1, 2, 3]), mx.ones(3 * layers, mx.bool_), 2).item(), rel=1e-6
    )
    assert all(isinstance(layer.block_sparse_moe.gate, nn.Module) for layer in model.layers)

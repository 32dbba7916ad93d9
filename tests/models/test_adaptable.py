"""What LoRA and DoRA cannot be put on is said in one sentence, before anything is trained."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from orpo_mlx.errors import ConfigError
from orpo_mlx.models.adaptable import chosen_modules
from orpo_mlx.models.adapters import add_adapters
from tests.conftest import CONFIGS, make_model

LORA: dict[str, Any] = {"rank": 2, "scale": 4.0, "dropout": 0.0}
IDS = mx.array([[3, 1, 4, 1, 5]])


def quantised(**how: Any) -> nn.Module:
    model = make_model("llama")
    nn.quantize(
        model, class_predicate=lambda _, each: hasattr(each, "to_quantized") and each.weight.shape[-1] % 32 == 0, **how
    )
    return model


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_start_as_the_model_itself_or_are_refused(kind: str, fine_tune_type: str) -> None:
    model = make_model(kind)
    before = model(IDS)
    if fine_tune_type == "dora" and any("switch" in name for name, _ in model.named_modules()):
        with pytest.raises(ConfigError, match="no DoRA for"):
            add_adapters(model, fine_tune_type, -1, LORA)
        return
    add_adapters(model, fine_tune_type, -1, LORA)
    assert mx.allclose(model(IDS), before, atol=1e-3).item()


@pytest.mark.parametrize("model", [make_model("llama"), quantised(group_size=32, bits=4)])
def test_a_rank_beyond_every_layers_own_is_refused(model: nn.Module) -> None:
    # The widest layers are of 32 by 32, 48 and 259 numbers.
    for rank in (33, 2**31 - 1):
        with pytest.raises(ConfigError, match=f"^lora_parameters.rank: found {rank}, expected 32 at most"):
            add_adapters(model, "lora", -1, {**LORA, "rank": rank})
    add_adapters(model, "lora", -1, {**LORA, "rank": 32})


@pytest.mark.parametrize(
    ("model", "fine_tune_type", "keys", "said"),
    [
        (
            make_model("mixtral"),
            "dora",
            None,
            "holds the experts of a layer, which mlx-lm has no DoRA for; use lora, or",
        ),
        (
            quantised(group_size=32, bits=4),
            "dora",
            ["model.embed_tokens"],
            "model.embed_tokens is a quantised embedding",
        ),
        (quantised(mode="mxfp4", group_size=32, bits=4), "dora", None, "is quantised as mxfp4"),
        (make_model("llama"), "lora", ["self_attn.q_proj", "input_layernorm"], "input_layernorm' is a RMSNorm"),
        (make_model("llama"), "lora", ["self_attn.rope"], "self_attn.rope' is a RoPE"),
        (make_model("llama"), "dora", ["mlp"], "mlp' is a MLP"),
    ],
)
def test_what_cannot_be_adapted_is_named(
    model: nn.Module, fine_tune_type: str, keys: list[str] | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        add_adapters(model, fine_tune_type, -1, {**LORA, **({"keys": keys} if keys else {})})


@pytest.mark.parametrize(("value", "what"), [(0.0, "of zeros"), (float("nan"), "that are not finite")])
def test_rows_that_dora_would_divide_by_nothing_are_named_with_their_layer(value: float, what: str) -> None:
    model = make_model("llama")
    weight = model.layers[1].mlp.up_proj.weight
    weight[3:5] = value
    with pytest.raises(ConfigError, match=rf"model\.layers\.1\.mlp\.up_proj has 2 of 48 rows .*{what}"):
        add_adapters(model, "dora", -1, LORA)
    add_adapters(make_model("llama"), "lora", -1, LORA)


@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj"], ["self_attn.q_proj", "lm_head", "model.embed_tokens"]])
def test_the_chosen_are_those_that_mlx_lm_adapts(keys: list[str] | None) -> None:
    model = make_model("llama")
    chosen = {name for name, _ in chosen_modules(model, 1, keys)}
    add_adapters(model, "lora", 1, {**LORA, **({"keys": keys} if keys else {})})
    assert chosen == {name for name, module in model.named_modules() if "lora_a" in module}

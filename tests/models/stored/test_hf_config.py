"""Configs saved by transformers 5, in the form mlx-lm reads."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_mlx.errors import ModelError
from orpo_mlx.models.stored.hf_config import normalise_config, rope_note, unseen_window

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
}


def config(model_type: str, **more: Any) -> dict[str, Any]:
    return {**BASE, "model_type": model_type, **more}


def test_theta_comes_out_of_the_nest() -> None:
    found = normalise_config(config("qwen2", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), "c")
    assert found["rope_theta"] == 5e5
    assert "rope_scaling" not in found


def test_scaling_keeps_both_names_of_its_type() -> None:
    nested = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    found = normalise_config(config("llama", rope_parameters=nested), "c")
    assert found["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}


def test_partial_rotation_and_neox_names() -> None:
    nested = {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.25}
    found = normalise_config(
        config("gpt_neox", rope_parameters=nested, layer_norm_eps=1e-5, use_parallel_residual=True), "c"
    )
    assert (found["rotary_emb_base"], found["rotary_pct"]) == (2e4, 0.25)


def test_settings_saved_under_a_new_name() -> None:
    assert normalise_config(config("qwen3_moe", num_local_experts=4), "c")["num_experts"] == 4


def test_two_bases_of_gemma3() -> None:
    nested = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    layers = ["sliding_attention", "full_attention"]
    found = normalise_config(config("gemma3_text", rope_parameters=nested, layer_types=layers), "c")
    assert (found["rope_theta"], found["rope_local_base_freq"], found["sliding_window_pattern"]) == (1e6, 1e4, 2)
    assert found["rope_scaling"]["factor"] == 8.0


def test_equal_settings_per_layer_type_are_one_setting() -> None:
    same = {"rope_theta": 7e4, "rope_type": "default"}
    nested = {"full_attention": same, "sliding_attention": dict(same)}
    assert normalise_config(config("llama", rope_parameters=nested), "c")["rope_theta"] == 7e4


def test_text_config_is_normalised_too() -> None:
    inner = {**BASE, "model_type": "qwen2", "rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}
    found = normalise_config({"model_type": "gemma3", "text_config": inner, "vision_config": {}}, "c")
    assert found["text_config"]["rope_theta"] == 3e5


def test_a_config_without_nesting_is_left_alone() -> None:
    plain = config("llama", rope_theta=123.0)
    assert normalise_config(plain, "c") == plain


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}}, "nested by a, b"),
        ({"rope_parameters": [1.0]}, "rope_parameters is a list"),
        ({"model_type": "never_heard_of"}, "'never_heard_of' is not one that mlx-lm can run"),
    ],
)
def test_what_is_unknown_is_refused_by_name(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        normalise_config({**config("llama"), **changes}, "config.json")


def test_layers_that_are_no_pattern() -> None:
    layers = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="not a repeating pattern"):
        normalise_config(config("gemma3_text", layer_types=layers), "c")


def test_longrope_is_noted_and_plain_rope_is_not() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert "log-probs differ from PyTorch's" in str(rope_note(config("phi3", rope_scaling=scaling)))
    assert rope_note(config("phi3", rope_scaling={**scaling, "long_factor": [1.0]})) is None
    assert rope_note(config("llama", rope_scaling={"rope_type": "linear", "factor": 2.0})) is None
    assert rope_note(config("llama")) is None


@pytest.mark.parametrize(
    ("model_type", "more", "window"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("gemma2", {"sliding_window": 4096}, 4096),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, None),
        ("llama", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, None),
    ],
)
def test_windows_that_mlx_lm_does_not_apply(model_type: str, more: dict[str, Any], window: int | None) -> None:
    assert unseen_window(config(model_type, **more)) == window

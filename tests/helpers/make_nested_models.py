"""Make tests/models/nested_models.json: what transformers 5 saves of tiny vision-language models, and computes with it.

Run with torch and peft: `python -m tests.helpers.make_nested_models`. For each family: config.json and the names and
shapes of tensors as `save_pretrained` writes them, and the log-probs (nats; log-softmax in float64, eager attention)
that the PyTorch model gives each token of `IDS` after the first, loaded with the weights of `named_weights`. For some,
the same of a PEFT adapter, whose matrices are made from their names likewise.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.named_weights import named_weights

OUT = Path(__file__).parent.parent / "models" / "nested_models.json"
# Longer than the windows below.
IDS = [5, 9, 17, 33, 40, 41, 50, 2, 11, 12, 39, 31, 7, 8, 25, 3]
VOCABULARY = 64
WEIGHTS = "adapter_model.safetensors"
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_IMAGE = {"image_size": 32, "patch_size": 16, **_SMALL}
_QWEN_EYE = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
_SPECIAL = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
_WINDOWS: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
}


def rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def rope_by_layer(full: dict[str, Any]) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": 5e3}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def families() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Name, model class, config class and settings."""
    sections: dict[str, Any] = {"mrope_section": [1, 1, 2]}
    pixtral = {"model_type": "pixtral", "head_dim": 8, **_IMAGE}
    eye = {**_QWEN_EYE, "num_position_embeddings": 16}
    for tied in (False, True):
        tie = {"tie_word_embeddings": tied}
        end = "_tied" if tied else ""
        three = {"vision_config": {**eye, "deepstack_visual_indexes": [0]}, **_SPECIAL, **tie}
        text = {**_TEXT, **rope(5e5, **sections, mrope_interleaved=True)}
        yield f"qwen3_vl{end}", "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {"text_config": text, **three}
        yield (
            f"qwen3_vl_moe{end}",
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3VLMoeConfig",
            {"text_config": {**text, **_EXPERTS}, **three},
        )
        text = {**_TEXT, **_LINEAR, **rope(1e6, partial_rotary_factor=0.5, mrope_section=[1, 1, 0])}
        five = {"vision_config": eye, **_SPECIAL, **tie}
        yield f"qwen3_5{end}", "Qwen3_5ForConditionalGeneration", "Qwen3_5Config", {"text_config": text, **five}
        yield (
            f"qwen3_5_moe{end}",
            "Qwen3_5MoeForConditionalGeneration",
            "Qwen3_5MoeConfig",
            {"text_config": {**text, **_EXPERTS, "shared_expert_intermediate_size": 16}, **five},
        )
        text = {key: value for key, value in _TEXT.items() if key != "head_dim"} | rope(5e5, **sections)
        yield (
            f"qwen2_vl{end}",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            {
                "text_config": text,
                "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
                **_SPECIAL,
                **tie,
            },
        )
        yield (
            f"qwen2_5_vl{end}",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {"text_config": text, "vision_config": {**_QWEN_EYE, "fullatt_block_indexes": [0]}, **_SPECIAL, **tie},
        )
        text = {**_TEXT, "model_type": "mistral", **rope(1e6)}
        see = {"vision_config": pixtral, "image_token_index": 60, **tie}
        yield f"mistral3{end}", "Mistral3ForConditionalGeneration", "Mistral3Config", {"text_config": text, **see}
        text = {**_TEXT, "model_type": "llama", **rope(2e4)}
        yield f"llava{end}", "LlavaForConditionalGeneration", "LlavaConfig", {"text_config": text, **see}
        yarn = rope(1e6, "yarn", factor=16.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.1)
        text = {**_TEXT, "model_type": "ministral3", **yarn}
        yield f"ministral3{end}", "Mistral3ForConditionalGeneration", "Mistral3Config", {"text_config": text, **see}
    yield (
        "lfm2_vl",
        "Lfm2VlForConditionalGeneration",
        "Lfm2VlConfig",
        {
            "text_config": {
                **_TEXT,
                "model_type": "lfm2",
                **rope(1e6),
                "layer_types": ["conv", "full_attention"],
                "block_auto_adjust_ff_dim": False,
            },
            "vision_config": {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4, **_SMALL},
            "tie_word_embeddings": True,
            "image_token_id": 60,
        },
    )
    signs = {"image_token_id": 60, "boi_token_id": 61, "eoi_token_id": 62}
    text = {**_TEXT, **_WINDOWS, **rope_by_layer({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6})}
    marks = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    yield (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {**text, "query_pre_attn_scalar": 8}, "vision_config": _IMAGE, **marks},
    )
    proportional = {"rope_type": "proportional", "rope_theta": 3e5, "partial_rotary_factor": 0.5}
    text = {**_TEXT, **_WINDOWS, **rope_by_layer(proportional), "global_head_dim": 16, "num_kv_shared_layers": 0}
    by_layer = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
    four = {
        "vision_config": {"patch_size": 4, "head_dim": 8, "num_key_value_heads": 2, **_SMALL},
        "audio_config": None,
        **signs,
        "video_token_id": 63,
        "audio_token_id": 59,
        "boa_token_id": 58,
        "eoa_token_index": 57,
    }
    layers = {"num_hidden_layers": 4, "layer_types": _WINDOWS["layer_types"] * 2, "num_kv_shared_layers": 2}
    for name, more in {
        "gemma4": by_layer,
        "gemma4_shared": {**by_layer, **layers},
        "gemma4_equal": {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
        },
        "gemma4_moe": {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    }.items():
        settings = {"text_config": {**text, **more}, **four}
        yield name, "Gemma4ForConditionalGeneration", "Gemma4Config", settings
    seen = {key: value for key, value in four.items() if key != "vision_config"}
    yield (
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        "Gemma4UnifiedConfig",
        {"text_config": text, **seen},
    )
    yield (
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": {
                **_TEXT,
                **rope(5e5),
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 1,
                "attention_chunk_size": 8,
                "num_hidden_layers": 4,
                "floor_scale": 4,
            },
            "vision_config": {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, **_IMAGE},
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
    )


def gemma3n() -> tuple[str, dict[str, Any]]:
    """Settings of the text model alone, for its whole needs another library."""
    layers = {"num_hidden_layers": 4, "layer_types": _WINDOWS["layer_types"] * 2, "num_kv_shared_layers": 2}
    return "Gemma3nForCausalLM", {
        **_TEXT,
        **_WINDOWS,
        **layers,
        **rope_by_layer({"rope_type": "default", "rope_theta": 1e6}),
        "intermediate_size": [48] * 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    }


ADAPTED = ("qwen3_vl_tied", "qwen3_5", "qwen2_5_vl", "gemma3", "mistral3")


def logps_of(model: Any) -> list[float]:
    torch: Any = importlib.import_module("torch")
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    return [float(logps[place, token]) for place, token in enumerate(IDS[1:])]


def adapted(model: Any, folder: Path) -> dict[str, Any]:
    """What PEFT saves of an adapter on the text part of `model`, and computes with it."""
    peft: Any = importlib.import_module("peft")
    torch: Any = importlib.import_module("torch")
    safetensors: Any = importlib.import_module("safetensors.torch")
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|down_proj)", task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, settings).save_pretrained(folder)
    shapes = {name: list(each.shape) for name, each in safetensors.load_file(folder / WEIGHTS).items()}
    weights = {name: torch.tensor(array) for name, array in named_weights(shapes).items()}
    safetensors.save_file(weights, folder / WEIGHTS, {"format": "pt"})
    # `get_peft_model` has put layers into `model`: a new one is loaded from the folder beside.
    plain = type(model).from_pretrained(folder.parent, attn_implementation="eager", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
    config = json.loads((folder / "adapter_config.json").read_text())
    return {"config": config, "shapes": shapes, "logps": logps_of(again)}


def save_and_score(model: Any, folder: Path, *, adapter: bool = False) -> dict[str, Any]:
    """One entry of the file."""
    torch: Any = importlib.import_module("torch")
    safetensors: Any = importlib.import_module("safetensors.torch")
    model.save_pretrained(folder)
    stored = safetensors.load_file(folder / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    weights = {name: torch.tensor(array) for name, array in named_weights(shapes).items()}
    safetensors.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    again = type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    # Its wrapper fails where there is no image.
    runs = again.language_model if "Llama4" in type(again).__name__ else again
    # What is seen or heard is not run; one name of it is kept, to be left out.
    other = [name for name in shapes if "vision" in name or "visual" in name]
    entry: dict[str, Any] = {
        "config": json.loads((folder / "config.json").read_text()),
        "shapes": {name: shape for name, shape in shapes.items() if name not in other[1:]},
        "logps": logps_of(runs),
    }
    if adapter:
        fresh = type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        entry["peft"] = adapted(fresh, folder / "adapter")
    return entry


def as_wrapped(entry: dict[str, Any]) -> dict[str, Any]:
    """A text model saved alone as it stands inside a whole."""
    config = {"model_type": "gemma3n", "transformers_version": "5.0.0", "text_config": entry["config"]}
    return {**entry, "config": config, "prefix": "model.language_model."}


def main() -> None:
    transformers: Any = importlib.import_module("transformers")
    torch: Any = importlib.import_module("torch")
    table = {}
    for name, model_class, config_class, settings in families():
        config = getattr(transformers, config_class)(**json.loads(json.dumps(settings)))
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            model = getattr(transformers, model_class)(config).float().eval()
            table[name] = save_and_score(model, Path(folder), adapter=name in ADAPTED)
    model_class, settings = gemma3n()
    model = getattr(transformers, model_class)(transformers.Gemma3nTextConfig(**settings)).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        table["gemma3n"] = as_wrapped(save_and_score(model, Path(folder)))
    OUT.write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()

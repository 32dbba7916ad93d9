"""Public architectures without their weights, to predict whether the configs in `data/configs/` fit their Macs.

`python -m tests.helpers.predict_for_macs` predicts them all and prints the rows of docs/results/figures/recipes.json.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orpo_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from orpo_mlx.config.command_line import resolve
from orpo_mlx.engine.modes import AUTOMATIC
from orpo_mlx.memory.cheap_products import cheap_products
from orpo_mlx.memory.fit import predicted
from orpo_mlx.memory.predict import recommended_working_set
from orpo_mlx.memory.skeleton import build, read_blueprint, weight_bytes
from orpo_mlx.models.known_shapes import LLAMA3, LLAMA_3_1_8B, LLAMA_3_2_3B, QWEN3, QWEN3_4B, sizes

CONFIGS = Path(__file__).resolve().parent.parent.parent / "data" / "configs"

_DTYPES = {mx.bfloat16: "BF16", mx.float32: "F32", mx.uint32: "U32"}

_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window_pattern": 6,
}


def _with_vision(text: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's config where the model sees images as well; mlx-lm has the text model alone."""
    text = {**text, "max_position_embeddings": 131072}
    return {"model_type": "gemma3", "vocab_size": 262208, "tie_word_embeddings": True, "text_config": text}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mlx-community/SmolLM2-1.7B-Instruct-4bit": {
        "model_type": "llama", "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 130000,
        "vocab_size": 49152, "max_position_embeddings": 8192, **sizes(2048, 8192, 24, 32, tied=True),
    },
    "mlx-community/Qwen3-1.7B-4bit": {**QWEN3, **sizes(2048, 6144, 28, 16, tied=True)},
    "mlx-community/Qwen3-4B-4bit": QWEN3_4B,
    "mlx-community/Qwen3.5-4B-MLX-4bit": {
        "model_type": "qwen3_5", "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_5_text", "head_dim": 256, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "vocab_size": 248320, "max_position_embeddings": 262144, "full_attention_interval": 4,
            "partial_rotary_factor": 0.25, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
            **sizes(2560, 9216, 32, 16, tied=True),
        },
    },
    "mlx-community/Llama-3.2-3B-Instruct-4bit": LLAMA_3_2_3B,
    "mlx-community/Llama-3.1-8B-Instruct-4bit": LLAMA_3_1_8B,
    "mlx-community/gemma-3-1b-it-4bit": {
        **_GEMMA3, "num_key_value_heads": 1, "sliding_window": 512, "vocab_size": 262144,
        "max_position_embeddings": 32768, **sizes(1152, 6912, 26, 4, tied=True),
    },
    "mlx-community/gemma-3-4b-it-4bit": _with_vision(
        {**_GEMMA3, "num_key_value_heads": 4, "sliding_window": 1024, **sizes(2560, 10240, 34, 8, tied=True)}
    ),
    "mlx-community/gemma-3-12b-it-4bit": _with_vision(
        {**_GEMMA3, "num_key_value_heads": 8, "sliding_window": 1024, **sizes(3840, 15360, 48, 16, tied=True)}
    ),
    "mlx-community/Qwen3-14B-4bit": {**QWEN3, **sizes(5120, 17408, 40, 40, tied=False)},
    "mlx-community/Qwen3-32B-4bit": {**QWEN3, **sizes(5120, 25600, 64, 64, tied=False)},
    "mlx-community/Llama-3.3-70B-Instruct-4bit": {**LLAMA3, **sizes(8192, 28672, 80, 64, tied=False)},
}  # fmt: skip
"""The config.json of each model, as far as its shape depends on it; all are quantised to 4 bits in groups of 64."""


def mac_gib(path: Path) -> int:
    """The memory of the Mac that a config is for, as its file name has it."""
    return int(path.name.partition("gb-")[0])


def write_headers(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder whose safetensors file has the header of a 4-bit model in bfloat16, and a hole for its weights."""
    config = {**config, "quantization": {"group_size": 64, "bits": 4}}
    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    header, end = {}, 0
    for name, array in dict(tree_flatten(model.parameters())).items():
        # mlx-lm's class of Gemma 3 has a head until it sees that the weights have none.
        if config["tie_word_embeddings"] and "lm_head" in name:
            continue
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_gib(folder: Path, dtype: str) -> float:
    """GiB of a model's weights, those of its floating-point numbers in a dtype."""
    blueprint = read_blueprint(str(folder), dtype=dtype)
    return weight_bytes(build(blueprint, blueprint.layers)) / 2**30


def predictions(folder: Path, names: Sequence[str] = ()) -> Iterator[list[Any]]:
    """A row of the published table for each config, or for those named: its peak with the weights as they are in the
    checkpoint and all else in float32.

    A Mac computes these models in bfloat16, which takes less; on a CPU that would take hours. `--memory auto` is
    predicted as the smallest mode it may take.
    """
    for path in sorted(CONFIGS.glob("*.yaml"), key=lambda path: (mac_gib(path), path.name)):
        if names and path.stem not in names:
            continue
        config = resolve(["-c", str(path)])
        if config.memory == "auto":
            config = dataclasses.replace(config, memory=AUTOMATIC[-1])
        model = write_headers(folder / path.stem, ARCHITECTURES[config.model])
        with cheap_products():
            prediction = predicted(config, read_blueprint(str(model), dtype="float32"))
        peak = prediction.peak - prediction.weights + weights_gib(model, "bfloat16")
        size = mac_gib(path)
        figures = [round(peak, 2), round(recommended_working_set(size), 2)]
        yield [path.name, size, config.method, config.max_seq_length, config.memory, *figures]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for row in predictions(Path(name), sys.argv[1:]):
            print(json.dumps(row), flush=True)

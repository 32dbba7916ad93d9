"""A whole model as a GGUF file, which llama.cpp, Ollama and LM Studio run, written with the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from orpo_mlx.convert.gguf_adapter import WRITTEN_AS, check_destination, gguf_package, permuted
from orpo_mlx.convert.gguf_tokenizer import same_tokens, tokenizer_metadata
from orpo_mlx.convert.merge import fuse, is_quantised
from orpo_mlx.convert.open_checkpoint import open_model
from orpo_mlx.convert.task import SCRATCH, Task, report
from orpo_mlx.convert.verify import (
    EXACT,
    MERGED,
    ROUNDED,
    Limit,
    Logps,
    check_within,
    difference_of,
    model_logps,
    probe_pairs,
)
from orpo_mlx.convert.write_model import byte_progress, take_weights
from orpo_mlx.errors import ModelError
from orpo_mlx.files import check_space, staged_file
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.gguf.architectures import ARCHITECTURES
from orpo_mlx.models.loading import ModelInfo, find, load, load_lazily
from orpo_mlx.models.names import DTYPES, FLOAT16_IN_FLOAT32
from orpo_mlx.models.peft_adapters import read_adapter
from orpo_mlx.models.stored.hf_config import unseen_window
from orpo_mlx.models.vocabulary import vocabulary_of
from orpo_mlx.run_folder import ADAPTERS_FILE
from orpo_mlx.types import TokenizedPair

WRITABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Kinds of models, by config.json's name, whose settings and tensors are written whole. The others that can be read
have tokenizers that are not written here."""

# What the architectures in GGUF do not express, with the only value they stand for.
_PLAIN_SETTINGS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
# llama.cpp's numbers of what most of a file's weights are.
_FILE_TYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 32}


class GgufModel(NamedTuple):
    """What a file holds."""

    architecture: str
    metadata: dict[str, Any]
    """Under GGUF's keys; a list of texts or whole numbers, a text, a truth value, a whole number or a float32 each."""
    arrays: dict[str, mx.array]
    """Under Hugging Face's names, not reordered, in the dtypes that are written."""
    tables: dict[str, np.ndarray[Any, Any]]
    """Settings that are stored as tensors, under GGUF's names."""


class Reference(NamedTuple):
    """What a written file is compared with."""

    what: str
    pairs: list[TokenizedPair]
    logps: Logps
    limit: Limit


def convert_to_gguf(source: str, adapter_path: str | None, task: Task) -> None:
    """A model, with an adapter merged into it where one is given, to a GGUF file.

    Matrices are in `task.dtype`, or in what they were; all else is float32, as llama.cpp wants it. Query and key rows
    are reordered where the architecture wants that.

    Args:
        source: Hub id, folder or `.gguf` file.
        adapter_path: a folder of adapters in mlx-lm's form.
        task: the destination is the file.

    Raises:
        ConfigError: the destination cannot be written, or the `gguf` package is not there.
        ModelError: the model or its tokenizer has no form in GGUF here, or what was written is not the model it was.
    """
    check_destination(task.destination, overwrite=task.overwrite)
    gguf_package()
    adapter = None if adapter_path is None else Path(adapter_path).expanduser()
    if adapter is not None:
        read_adapter(adapter, ADAPTERS_FILE, source="`adapter_path`")
    with staged_file(task.destination, overwrite=task.overwrite) as file:
        scratch = file.with_name(SCRATCH)
        info = open_model(source, scratch, source="SRC", trust_remote_code=task.trust_remote_code).info
        check_writable(info, source)
        references = references_of(info, adapter, task, source) if task.verify else []
        model, _ = model_to_write(info, adapter, task, source)
        written = write_gguf_model(file, as_gguf_model(model, info, source), task.destination)
        if references:
            verify_gguf(file, info, references, task.destination)
    report(task, written)


def check_writable(info: ModelInfo, source: str) -> None:
    """Make sure that a model can be expressed.

    Raises:
        ModelError: it cannot.
    """
    kind = info.config.get("model_type")
    if kind not in WRITABLE:
        raise ModelError(
            f"SRC {source}: a {kind} model is not written to GGUF here, only {', '.join(WRITABLE)} are; write a folder "
            "with hf or merge, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    if info.tokenizer is None:
        raise ModelError(f"SRC {source}: has no tokenizer, which a GGUF file holds as well; put it beside the weights.")
    for name, plain in _PLAIN_SETTINGS.items():
        if info.config.get(name) not in (None, plain):
            raise ModelError(
                f"SRC {source}: its {name} is {info.config[name]!r}, which a {kind} model in GGUF cannot express."
            )
    window = unseen_window(info.config) or info.config.get("sliding_window")
    if window and info.config.get("use_sliding_window", True) and kind in ("llama", "mistral"):
        print(f"note: GGUF holds no attention window for {kind}; texts longer than its {window} tokens differ.")


def references_of(info: ModelInfo, adapter: Path | None, task: Task, source: str) -> list[Reference]:
    """What the written model is compared with: the model as it was and, where that is rounded, the rounded one too."""
    original = original_model(info, adapter, task)
    pairs = probe_pairs(info.tokenizer, vocabulary_of(original), info.config)
    logps = model_logps(original, pairs)
    # Two models need not fit side by side.
    del original
    model, rounded = model_to_write(info, adapter, task, source)
    limit = (EXACT if adapter is None else MERGED) if not rounded else ROUNDED
    found = [Reference("the model as it was", pairs, logps, limit)]
    if rounded:
        name = next(name for name, dtype in DTYPES.items() if dtype == embedding_of(model).dtype)
        model.set_dtype(mx.float32)
        model.eval()
        found.append(Reference(f"its matrices in {name}", pairs, model_logps(model, pairs), EXACT))
    return found


def original_model(info: ModelInfo, adapter: Path | None, task: Task) -> nn.Module:
    """The model as it was, with its adapter, run in float32."""
    # A GGUF file's blocks are expanded to float16, unless float32 is what is written.
    rounded = info.path.is_file() and task.dtype != "float32"
    dtype = FLOAT16_IN_FLOAT32 if rounded else "float32"
    model = load(info, dtype=dtype, trust_remote_code=task.trust_remote_code).model
    if adapter is not None:
        add_trained_adapters(model, adapter)
    return model


def model_to_write(info: ModelInfo, adapter: Path | None, task: Task, source: str) -> tuple[nn.Module, bool]:
    """The model in floating point, its adapter merged, matrices in the dtype that is written; whether that rounds."""
    exact = mx.float32 if task.dtype == "float32" else mx.float16
    model, _ = load_lazily(info, trust_remote_code=task.trust_remote_code, gguf=exact)
    wanted = DTYPES[task.dtype] if task.dtype else None
    computed = adapter is not None or is_quantised(model)
    if adapter is not None:
        add_trained_adapters(model, adapter)
    if computed:
        # In float32 where another dtype is wanted, so that it is rounded once.
        fuse(model, mx.float32 if wanted else None, source if adapter is None else str(adapter))
    before = embedding_of(model).dtype
    if wanted is not None:
        model.update(tree_map(lambda array: array.astype(wanted) if array.ndim > 1 else array, model.parameters()))
    after = embedding_of(model).dtype
    return model, after != mx.float32 and (computed or after != before)


def embedding_of(model: nn.Module) -> mx.array:
    """The embedding's weight, as mlx-lm's classes of `WRITABLE` have it."""
    found: mx.array = model.model.embed_tokens.weight
    return found


def as_gguf_model(model: nn.Module, info: ModelInfo, source: str) -> GgufModel:
    """The model's settings, tokenizer and weights; the model lets go of its weights.

    Raises:
        ModelError: a setting or the tokenizer cannot be expressed.
    """
    assert info.tokenizer is not None
    kind = str(info.config["model_type"])
    architecture = WRITTEN_AS.get(kind, kind)
    embedding = embedding_of(model)
    settings = settings_of(model.args, source)
    metadata: dict[str, Any] = {
        "general.type": "model",
        # Of Qwen/Qwen3-0.6B not Qwen3-0: what follows a dot is an ending in a file's name alone.
        "general.name": Path(source).stem if Path(source).is_file() else Path(source).name,
        "general.file_type": _FILE_TYPES[embedding.dtype],
        **{f"{architecture}.{key}": value for key, value in settings.items()},
        f"{architecture}.vocab_size": embedding.shape[0],
        **tokenizer_metadata(info.tokenizer, embedding.shape[0], f"SRC {source}"),
    }
    # In one dimension float32: llama.cpp's kernels multiply with no other norms and add no other biases.
    arrays = {
        name: array.astype(mx.float32) if array.ndim == 1 else array for name, array in take_weights(model).items()
    }
    return GgufModel(architecture, metadata, arrays, rope_tables(model.args))


def settings_of(args: Any, source: str) -> dict[str, Any]:
    """A model's numbers under GGUF's names, from mlx-lm's record of its settings; floats are float32 there.

    Raises:
        ModelError: its RoPE scaling cannot be expressed.
    """
    heads = args.num_attention_heads
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // heads
    settings = {
        "context_length": int(getattr(args, "max_position_embeddings", None) or 0),
        "embedding_length": args.hidden_size,
        "block_count": args.num_hidden_layers,
        "feed_forward_length": args.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": args.num_key_value_heads or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": np.float32(args.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": np.float32(args.rope_theta),
    }
    scaling = args.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": np.float32(scaling["factor"])}
    elif kind not in ("default", "llama3"):
        raise ModelError(f"SRC {source}: RoPE scaling of type {kind} is not written to GGUF here.")
    return settings


def rope_tables(args: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Llama 3's scaling as GGUF has it: what each frequency is divided by, float32; empty for other models.

    With w = 2π · base^(2i/d), a frequency's wavelength, and the original context c: 1 where w < c / high, the factor
    where w > c / low, and between them 1 / ((1 - s) / factor + s) with s = (c / w - low) / (high - low).
    """
    scaling = args.rope_scaling or {}
    if (scaling.get("rope_type") or scaling.get("type")) != "llama3":
        return {}
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] / (
        2 * np.pi * args.rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    )
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def write_gguf_model(path: Path, model: GgufModel, destination: Path) -> int:
    """Write the file, a tensor in memory at a time, and empty `model.arrays` on the way; the bytes of the tensors."""
    gguf = gguf_package()
    architecture = ARCHITECTURES[model.architecture]
    settings = {key.partition(".")[2]: value for key, value in model.metadata.items()}
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.architecture)
    names = gguf.get_tensor_name_map(number, settings["block_count"])
    writer = gguf.GGUFWriter(str(path), model.architecture)
    for key, value in model.metadata.items():
        add_value(writer, key, value)
    tables = {name: mx.array(table) for name, table in model.tables.items()}
    tensors = {**tables, **{tensor_name(names, name): array for name, array in model.arrays.items()}}
    model.arrays.clear()
    for name, array in tensors.items():
        raw = gguf.GGMLQuantizationType.BF16 if array.dtype == mx.bfloat16 else None
        # NumPy has no bfloat16: any type of its size will do, since `raw_dtype` says what it is.
        kind = np.dtype(np.float32 if array.dtype == mx.float32 else np.float16)
        writer.add_tensor_info(name, array.shape, kind, array.nbytes, raw_dtype=raw)
    total = sum(array.nbytes for array in tensors.values())
    check_space(path.parent, total)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {
        "num_attention_heads": settings["attention.head_count"],
        "num_key_value_heads": settings["attention.head_count_kv"],
    }
    with byte_progress(f"writing {destination.name}", total) as advance:
        for name in list(tensors):
            array = tensors.pop(name)
            # NumPy has no bfloat16; rows are moved whole, so any type of that size will do.
            values = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
            writer.write_tensor_data(
                np.ascontiguousarray(permuted(values, name.rpartition(".")[0], architecture, heads))
            )
            advance(values.nbytes)
    writer.close()
    return total


def tensor_name(names: Any, name: str) -> str:
    """GGUF's name of a tensor, from the package's table.

    Raises:
        ModelError: it has none.
    """
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"SRC: {name} has no name in a GGUF file of this architecture.")
    return str(found)


def add_value(writer: Any, key: str, value: Any) -> None:
    """One entry of the metadata, in the type that llama.cpp expects of it."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.float32):
        writer.add_float32(key, float(value))
    else:
        writer.add_uint32(key, int(value))


def verify_gguf(path: Path, info: ModelInfo, references: list[Reference], destination: Path) -> None:
    """Compare what this package's own reader makes of the file, run in float32, with the model it was.

    Raises:
        ModelError: tokens or log-probs differ.
    """
    written = find(str(path))
    assert info.tokenizer is not None
    assert written.tokenizer is not None
    if not same_tokens(info.tokenizer, written.tokenizer):
        raise ModelError(f"{destination}: its tokenizer gives other tokens than the original, so nothing was kept.")
    found = model_logps(load(written, dtype="float32").model, references[0].pairs)
    for reference in references:
        difference = difference_of(reference.logps, found)
        print(f"compared with {reference.what}: {difference}")
        check_within(difference, reference.limit, str(destination))

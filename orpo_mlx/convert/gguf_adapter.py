"""A LoRA adapter as a GGUF file, which llama.cpp, Ollama and LM Studio put on a GGUF model."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.files import staged_file
from orpo_mlx.models.gguf.architectures import ARCHITECTURES, Architecture
from orpo_mlx.models.gguf.file import read_gguf
from orpo_mlx.models.loading import find, load_lazily
from orpo_mlx.models.peft_adapters import Adapter, check_fits, read_adapter
from orpo_mlx.run_folder import ADAPTERS_FILE

Array = npt.NDArray[np.float32]

WRITTEN_AS = {"mistral": "llama"}
"""Kinds of models that llama.cpp writes as another one."""
_LAYER = re.compile(r"(?:language_model\.)?model\.layers\.(\d+)\.(.+)\.(lora_a|lora_b)")


class GgufAdapter(NamedTuple):
    """What a file holds."""

    architecture: str
    alpha: float
    """The effect of a layer is α / r · B·A, r being the rows of its A."""
    tensors: dict[str, Array]
    """`blk.N.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r), as NumPy has their shapes."""


def convert_mlx_to_gguf(source: str, model_name: str, destination: Path, *, overwrite: bool, trust: bool) -> None:
    """An adapter folder of mlx-lm or of `train` to a GGUF file.

    Args:
        source: the folder.
        model_name: its base model: Hub id, folder or `.gguf` file.
        destination: the file to write.
        overwrite: whether to replace it.
        trust: whether Python code that comes with the checkpoint may run.

    Raises:
        ConfigError: the destination is there, or the `gguf` package is not.
        ModelError: the adapter has no form in GGUF, or what was written is not what is read back.
    """
    check_destination(destination, overwrite=overwrite)
    gguf_package()
    folder = Path(source).expanduser()
    adapter = read_adapter(folder, ADAPTERS_FILE, source="SRC")
    info = find(model_name, trust_remote_code=trust)
    stated = read_gguf(info.path).metadata.get("general.architecture") if info.path.is_file() else None
    found = as_gguf(adapter, info.config, stated, str(folder))
    # Rows are in the order of this model's heads: read back they are what was written, whatever model that is for.
    check_fits(adapter, load_lazily(info, trust_remote_code=trust)[0], str(folder))
    with staged_file(destination, overwrite=overwrite) as file:
        write_gguf_adapter(file, found)
        check_written(file, found, destination)
    print(f"wrote {destination}: {len(found.tensors) // 2} layers, read back and equal")


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Make sure, before any work, that a file can be written there; ConfigError where it cannot."""
    if destination.suffix != ".gguf" or not destination.parent.is_dir():
        raise ConfigError(f"DST {destination}: expected a file that ends in .gguf, in a folder that exists.")
    if destination.exists() and not overwrite:
        raise ConfigError(f"DST {destination}: exists already; give `overwrite` to replace it, or another file.")


def gguf_package() -> Any:
    """The `gguf` package; ConfigError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError("GGUF files are written with the gguf package: pip install 'orpo-mlx[gguf]'.") from None


def as_gguf(adapter: Adapter, config: Mapping[str, Any], stated: str | None, location: str) -> GgufAdapter:
    """An adapter under GGUF's names, its query and key rows in llama.cpp's order.

    Args:
        adapter: in mlx-lm's form.
        config: the base model's settings.
        stated: the architecture that the base model's GGUF file states; None where it is no such file.
        location: of the adapter, for errors.

    Raises:
        ModelError: it is not LoRA, or the model or a layer has no name in GGUF here.
    """
    kind = adapter.config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ModelError(f"{location}: is an adapter of type {kind}, and GGUF has LoRA alone; merge it instead.")
    model_type = str(config.get("model_type"))
    name = stated or WRITTEN_AS.get(model_type, model_type)
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{location}: a {name} model's names in GGUF are not known, only {', '.join(ARCHITECTURES)}'s."
        )
    scale = (adapter.config.get("lora_parameters") or {}).get("scale")
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise ModelError(f"{location}: adapter_config.json has no number as lora_parameters.scale.")
    rank = max(array.shape[1] for key, array in adapter.weights.items() if key.endswith("lora_a"))
    architecture = ARCHITECTURES[name]
    tensors = {}
    for key, array in adapter.weights.items():
        stem, side = gguf_name(key, architecture, location)
        matrix = np.array(array.astype(mx.float32)).T
        if side == "lora_b":
            # There is one α for all layers, and r is each layer's own.
            matrix = permuted(matrix, stem, architecture, config) * np.float32(matrix.shape[1] / rank)
        tensors[f"{stem}.weight.{side}"] = np.ascontiguousarray(matrix, np.float32)
    return GgufAdapter(name, float(scale) * rank, tensors)


def gguf_name(key: str, architecture: Architecture, location: str) -> tuple[str, str]:
    """GGUF's name of an adapter tensor's layer, `blk.N.attn_q`, and which of the two matrices it is.

    Raises:
        ModelError: the layer has none here.
    """
    found = _LAYER.fullmatch(key)
    names = {theirs: ours for ours, theirs in architecture.names.items()}
    if found is None or found[2] not in names:
        raise ModelError(
            f"{location}: {key} has no name in a GGUF file of a {architecture.model_type} model; merge it."
        )
    return f"blk.{found[1]}.{names[found[2]]}", found[3]


def permuted(matrix: Array, stem: str, architecture: Architecture, config: Mapping[str, Any]) -> Array:
    """B (out, r) of a query or key layer with its rows in the order of llama.cpp's RoPE, which pairs up the two halves
    of each head; any other as it is."""
    part = stem.rpartition(".")[2]
    if not architecture.permuted or part not in ("attn_q", "attn_k"):
        return matrix
    heads = int(config["num_attention_heads"])
    if part == "attn_k":
        heads = int(config.get("num_key_value_heads") or heads)
    rows = matrix.shape[0]
    if rows % (2 * heads):
        raise ModelError(f"{stem}: the adapter has {rows} rows and the model {heads} heads; check `model`.")
    found: Array = matrix.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)
    return found


def write_gguf_adapter(path: Path, adapter: GgufAdapter) -> None:
    """Write the file with the `gguf` package."""
    writer = gguf_package().GGUFWriter(str(path), adapter.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    for name, array in adapter.tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_written(path: Path, adapter: GgufAdapter, destination: Path) -> None:
    """Read a file back with this package's own reader and compare all of it; ModelError where it differs."""
    file = read_gguf(path)
    found = read_arrays(path)
    equal = found.keys() == adapter.tensors.keys() and all(
        np.array_equal(found[name], array) for name, array in adapter.tensors.items()
    )
    # The file has α in float32, which need not be the number that was given.
    if not equal or file.metadata.get("adapter.lora.alpha") != np.float32(adapter.alpha):
        raise ModelError(f"DST {destination}: what was written is not what is read back, so nothing was kept.")


def read_arrays(path: Path) -> dict[str, Array]:
    """The tensors of a file of float32."""
    return {
        name: np.fromfile(path, np.float32, int(np.prod(tensor.shape)), offset=tensor.start).reshape(tensor.shape)
        for name, tensor in read_gguf(path).tensors.items()
    }

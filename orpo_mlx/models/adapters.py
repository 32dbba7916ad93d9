"""Adapters: a thin layer over mlx-lm's tuner. Same layers, same names, same files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from orpo_mlx.errors import ConfigError, ModelError, reason_of
from orpo_mlx.files import read_json_table
from orpo_mlx.models.adaptable import check_adaptable, check_magnitudes
from orpo_mlx.models.peft_adapters import check_layers, check_rank, peft_to_mlx, read_adapter, unwrapped
from orpo_mlx.models.peft_config import read_scaling, refuse_inexpressible
from orpo_mlx.models.peft_names import PREFIX, read_peft_tensors
from orpo_mlx.models.stored.safetensors_files import read_header
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, PEFT_WEIGHTS


def add_adapters(
    model: nn.Module,
    fine_tune_type: str,
    num_layers: int,
    lora_parameters: Mapping[str, Any],
    *,
    full_model: bool = False,
) -> None:
    """Freeze the model and make the last `num_layers` blocks (-1: all) trainable as `fine_tune_type` says.

    Args:
        model: an mlx-lm model.
        fine_tune_type: "lora", "dora" or "full" (the blocks' own weights).
        full_model: with "full", also what is outside of the blocks: embeddings, final norm, head.
        num_layers: how many blocks, counted from the last.
        lora_parameters: mlx-lm's `rank`, `scale`, `dropout` and optional `keys` (module names within a block).

    Raises:
        ConfigError: more layers than the model has, keys that match nothing or no layer that can be adapted, "full" for
            quantised weights, or DoRA where mlx-lm has none, or where a row of zeros would make it 0 / 0.
    """
    blocks = len(model.layers)
    if num_layers > blocks:
        raise ConfigError(
            f"`num_layers={num_layers}`: the model has {blocks} layers; give at most that, or -1 for all."
        )
    model.freeze()
    if fine_tune_type == "full":
        if full_model:
            model.unfreeze()
            for block in model.layers:
                block.freeze()
        # [-0:] is all of them, as -1 asks for. What is outside of the blocks stays frozen otherwise: mlx-lm's rule.
        for block in model.layers[-max(num_layers, 0) :]:
            block.unfreeze()
        # MLX holds quantised weights packed in uint32.
        if any(array.dtype == mx.uint32 for array in adapter_weights(model).values()):
            raise ConfigError(
                "`fine_tune_type=full`: this model's weights are quantised and have no gradient; use lora or dora, or "
                "a model that is not quantised."
            )
    else:
        check_adaptable(model, fine_tune_type, num_layers, lora_parameters)
        linear_to_lora_layers(model, num_layers, dict(lora_parameters), use_dora=fine_tune_type == "dora")
        check_magnitudes(model)
    # mlx-lm skips keys that match nothing in silence.
    trained = dict(tree_flatten(model.trainable_parameters()))
    for key in lora_parameters.get("keys") or () if fine_tune_type != "full" else ():
        if not any(f".{key}." in f".{name}" for name in trained):
            raise ConfigError(
                f"lora_parameters.keys: {key!r} matches no layer of this model; give names within a block."
            )


def has_switchable_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters beside its weights, as LoRA and DoRA are, which `adapters_off` switches off."""
    return any("lora_a" in module for _, module in model.named_modules())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model for the length of a `with` block: each adapted layer is swapped for the layer it wraps.

    The base layers are the very objects that were loaded, so log-probs are the base model's bit for bit. Valid for
    LoRA and DoRA; full fine-tuning changes the base itself.
    """
    adapted = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    base = [(name, unwrapped(module)) for name, module in adapted]
    model.update_modules(tree_unflatten(base))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))


@contextmanager
def adapters_merged(model: nn.Module) -> Iterator[None]:
    """The model with its adapters added into weights of their own for the length of a `with` block.

    The same function but for rounding, and a fifth faster for each token that is generated on a CPU; the weights of
    the adapted layers are held twice. Valid for LoRA and DoRA.
    """
    adapted = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    model.update_modules(tree_unflatten([(name, module.fuse()) for name, module in adapted]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the length of a `with` block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters by their flat names: what an adapter file holds."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapter_metadata(path: str | Path) -> dict[str, str]:
    """What the header of an adapter file (or of the one in a folder) says besides its arrays.

    Raises:
        ModelError: the file is missing or damaged.
    """
    return read_header(_adapter_file(Path(path))).metadata


def load_adapter_file(model: nn.Module, path: str | Path, scale: float) -> None:
    """Set the trainable parameters from an adapter file, mlx-lm's or PEFT's (its two matrices per layer, transposed).

    Args:
        model: a model with adapters added.
        path: the safetensors file, or the folder that holds `adapters.safetensors` or `adapter_model.safetensors`.
        scale: this run's LoRA scale; a config beside the file that says another one is an error, since the same
            matrices under another scale are another model.

    Raises:
        ModelError: the file is missing or does not fit the model's adapters exactly, or its config says something that
            they cannot express.
    """
    path = _adapter_file(Path(path))
    try:
        loaded = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({reason_of(error, first_line=True)}).") from None
    assert isinstance(loaded, dict)
    config_file = path.parent / ADAPTER_CONFIG_FILE
    config = read_json_table(config_file, ModelError) if config_file.is_file() else {}
    if any(name.startswith(PREFIX) for name in loaded):
        weights, theirs = _from_peft(model, loaded, config, config_file)
    else:
        weights, theirs = loaded, _scale_of(config, scale, config_file)
    # alpha / r need not be the very float that was given as a scale.
    if abs(theirs - scale) > 1e-6 * abs(scale):
        raise ModelError(
            f"{config_file}: this adapter was made with LoRA scale {theirs:g}, this run has {scale:g}; "
            f"set lora_parameters.scale to {theirs:g} in the config file."
        )
    _check_fit(weights, adapter_weights(model), path)
    own = adapter_weights(model)
    # Not strict: the file holds only what is trained, and all of that, as `_check_fit` has seen.
    model.load_weights([(name, weights[name].astype(array.dtype)) for name, array in own.items()], strict=False)


def _check_fit(weights: Mapping[str, mx.array], own: Mapping[str, mx.array], path: Path) -> None:
    """Make sure that an adapter file has exactly the arrays that are trainable."""
    problems = [f"{name} is not a trainable parameter here" for name in weights if name not in own]
    problems += [f"{name} is missing" for name in own if name not in weights]
    problems += [
        f"{name} has shape {weights[name].shape}, expected {array.shape}"
        for name, array in own.items()
        if name in weights and weights[name].shape != array.shape
    ]
    if not problems:
        return
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    advice = "check `model`, `num_layers` and lora_parameters (rank, keys)"
    theirs, ours = (any(name.endswith(".m") for name in names) for names in (weights, own))
    if theirs != ours:
        advice = f"it is of {'DoRA' if theirs else 'LoRA'}: set `fine_tune_type` to {'dora' if theirs else 'lora'}"
    raise ModelError(f"{path}: does not fit this model's adapters: {'; '.join(problems[:3])}{more}; {advice}.")


def _from_peft(
    model: nn.Module, tensors: Mapping[str, mx.array], config: Mapping[str, Any], config_file: Path
) -> tuple[dict[str, mx.array], float]:
    """A PEFT adapter's arrays under mlx-lm's names, and its scale."""
    if not config:
        raise ModelError(
            f"{config_file}: is not there, and a PEFT adapter's alpha, rank and patterns are said nowhere else; put it "
            "beside the weights."
        )
    refuse_inexpressible(config, str(config_file))
    read = read_peft_tensors(tensors, model, str(config_file.parent))
    scaling = read_scaling(config, str(config_file), itertools.chain(*read.modules.values()))
    check_layers(set(read.modules), dict(model.named_modules()), scaling, str(config_file.parent))
    return read.weights, scaling.scale


def _adapter_file(path: Path) -> Path:
    """The adapters' file at `path`, or in it where it is a folder."""
    file = weights_file(path) or path
    if not file.is_file():
        raise ModelError(f"`resume_adapter_file` {path}: no such adapter file.")
    return file


def weights_file(folder: Path) -> Path | None:
    """The file of adapters' weights in a folder, mlx-lm's before PEFT's; None where there is neither."""
    return next((folder / name for name in (ADAPTERS_FILE, PEFT_WEIGHTS) if (folder / name).is_file()), None)


def _scale_of(config: Mapping[str, Any], scale: float, config_file: Path) -> float:
    """The LoRA scale that the config beside mlx-lm's arrays has, in its words or PEFT's; `scale` where it has none."""
    if "lora_alpha" in config:
        return read_scaling(config, str(config_file)).scale
    try:
        return float((config.get("lora_parameters") or {}).get("scale", scale))
    except (ValueError, TypeError, AttributeError):
        raise ModelError(f"{config_file}: cannot be read as an adapter config of mlx-lm or PEFT.") from None


def add_trained_adapters(model: nn.Module, folder: Path, source: str = "`adapter_path`") -> None:
    """Put the adapters in `folder`, mlx-lm's or PEFT's, on the model, ready to run.

    Args:
        model: the base model, without adapters.
        folder: adapter_config.json and adapters.safetensors or, of PEFT, adapter_model.safetensors.
        source: what the user gave the folder with, for errors.

    Raises:
        ModelError: mlx-lm cannot load them, or PEFT's say something that mlx-lm's adapters cannot express.
    """
    weights = weights_file(folder)
    if weights is None:
        raise ModelError(
            f"{source} {folder}: holds neither {ADAPTERS_FILE} nor PEFT's {PEFT_WEIGHTS}; give one of them."
        )
    if weights.name == PEFT_WEIGHTS:
        # How a checkpoint names its modules is asked only for the way back.
        adapter = peft_to_mlx(read_adapter(folder, PEFT_WEIGHTS, source=source), model, {}, str(folder))
        model.load_weights(list(adapter.weights.items()), strict=False)
    else:
        config_file = folder / ADAPTER_CONFIG_FILE
        config = read_json_table(config_file, ModelError) if config_file.is_file() else {}
        check_rank(config, (tensor.shape for tensor in read_header(weights).tensors.values()), f"{source} {folder}")
        try:
            load_adapters(model, str(folder))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise ModelError(f"{source} {folder}: {_why_not_loaded(folder, error)}.") from None
        _check_all_loaded(model, weights, source)
    mx.eval(model.parameters())
    model.eval()


def _check_all_loaded(model: nn.Module, file: Path, source: str) -> None:
    """Make sure that every array of an adapter file has a place in the model, and every adapter an array.

    mlx-lm 0.31 leaves out in silence what has none, and no version asks for an adapter that is not in the file: what it
    was made with, which for lora_a is drawn at random, stays in its place.
    """
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    stored, own = set(arrays), set(dict(tree_flatten(model.parameters())))
    made = {name for name in own if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")}
    for names, what in ((stored - own, "has no place in the model"), (made - stored, "is not in the file")):
        if names:
            raise ModelError(
                f"{source} {file}: with this adapter_config.json {min(names)} {what} (and {len(names) - 1} more); "
                "check its keys, num_layers and fine_tune_type."
            )


def _why_not_loaded(folder: Path, error: Exception) -> str:
    """What mlx-lm says of adapters it does not take; of the thousands of lines about another model's, the first."""
    # One line a parameter, indented, after a line that says what they are.
    _, *misfits = (line.strip() for line in str(error).strip().splitlines() or [""])
    if not misfits:
        return f"mlx-lm cannot load these adapters ({reason_of(error)})"
    config = read_json_table(folder / ADAPTER_CONFIG_FILE, ModelError)
    made_for = f"; they were made for {config['model']}" if isinstance(config.get("model"), str) else ""
    more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
    return f"these adapters are not of this model ({misfits[0]}{more}){made_for}; give the model they were made for"

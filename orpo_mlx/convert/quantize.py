"""Make a model smaller before it is written: another dtype, or quantised."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import quantize_model

from orpo_mlx.convert.quantisation import MIXED_BITS, Quantisation
from orpo_mlx.errors import ConfigError


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Set the dtype of all floating-point weights, but for those the model's class wants kept."""
    keep: Any = getattr(model, "cast_predicate", lambda _: True)

    def convert(name: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if keep(name) and mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(convert, model.parameters()))


def finer_layers(model: nn.Module, how: Quantisation) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """What mlx-lm asks of each layer: whether to quantise it, or with which settings of its own."""
    # A model's class says of some layers, such as routers of experts, that they stay as they are.
    own: Any = getattr(model, "quant_predicate", None) or (lambda name, module: True)
    more = {"group_size": how.group_size, "bits": MIXED_BITS, "mode": how.mode}

    def settings(name: str, module: nn.Module) -> bool | dict[str, Any]:
        found: bool | dict[str, Any] = own(name, module)
        return dict(more) if found and name in how.finer else found

    return settings


def quantise(model: nn.Module, config: dict[str, Any], how: Quantisation) -> tuple[dict[str, Any], list[str]]:
    """Quantise every layer that can be, by mlx-lm.

    Returns:
        The config with the settings in it, and the names of layers left as they are because their width is no multiple
        of the group size.

    Raises:
        ConfigError: the model is quantised already, or no layer's width is a multiple of the group size.
    """
    if "quantization" in config:
        raise ConfigError("`quantize`: this checkpoint is quantised already; start from its unquantised original.")
    wanted = {
        name: module for name, module in model.named_modules() if hasattr(module, "to_quantized") and "weight" in module
    }
    # mlx-lm leaves these as they are without a word.
    odd = sorted(name for name, module in wanted.items() if module.weight.shape[-1] % how.group_size)
    if len(odd) == len(wanted):
        raise ConfigError(f"`group_size={how.group_size}`: no layer's width is a multiple of it; give a smaller one.")
    with contextlib.redirect_stdout(io.StringIO()):  # It prints a line of its own.
        predicate = finer_layers(model, how) if how.finer else None
        _, config = quantize_model(model, config, how.group_size, how.bits, mode=how.mode, quant_predicate=predicate)
    return config, odd

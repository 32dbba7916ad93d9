"""Which modules LoRA and DoRA can be put on: asked before mlx-lm does it, which fails half way, or trains nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from orpo_mlx.errors import ConfigError

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_ANY = (*_LINEAR, *_EXPERTS, *_EMBEDDINGS)


def check_adaptable(model: nn.Module, fine_tune_type: str, num_layers: int, lora: Mapping[str, Any]) -> None:
    """Make sure that mlx-lm can adapt each module that these settings choose.

    Args:
        model: an mlx-lm model, without adapters.
        fine_tune_type: "lora" or "dora".
        num_layers: how many blocks, counted from the last; -1 for all.
        lora: `lora_parameters`.

    Raises:
        ConfigError: it cannot; the module and what to do are named.
    """
    chosen = chosen_modules(model, num_layers, lora.get("keys"))
    for name, module in chosen:
        kind = type(module).__name__
        own = hasattr(module, "to_lora")
        if not own and not isinstance(module, _ANY):
            raise ConfigError(
                f"lora_parameters.keys: {name!r} is a {kind}, and adapters go on linear layers, experts and "
                "embeddings; give names of such, as self_attn.q_proj."
            )
        if fine_tune_type == "dora":
            _check_dora(model, name, module, num_layers)
    _check_rank(lora["rank"], [module for _, module in chosen])


def _check_rank(rank: int, modules: Iterable[nn.Module]) -> None:
    """Refuse a rank that no product of two matrices can have; far beyond it MLX ends the process."""
    largest = max((min(_shape(module)) for module in modules if isinstance(module, _ANY)), default=None)
    if largest is not None and rank > largest:
        raise ConfigError(
            f"lora_parameters.rank: found {rank}, expected {largest} at most: no layer that is adapted here has a "
            "higher rank itself; give a lower one."
        )


def _shape(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer, be its weights packed or not."""
    *_, outputs, inputs = module["weight"].shape
    return outputs, module["scales"].shape[-1] * module.group_size if "scales" in module else inputs


def check_magnitudes(model: nn.Module) -> None:
    """Make sure that no row of a layer that DoRA scales is zero, after it was put on.

    DoRA divides each row of W + B A by its norm, which is 0 / 0 for a row of zeros (pruned, padded or never trained).

    Raises:
        ConfigError: there is one, or a weight that is not finite; the layer is named.
    """
    for name, module in model.named_modules():
        if "m" not in module or "lora_a" not in module:
            continue
        rows = module["m"]
        unusable: Any = mx.sum(mx.logical_or(rows == 0, mx.logical_not(mx.isfinite(rows)))).item()
        bad = int(unusable)
        if bad:
            what = "of zeros" if bool(mx.all(mx.isfinite(rows)).item()) else "with numbers that are not finite"
            raise ConfigError(
                f"`fine_tune_type=dora`: {name} has {bad} of {rows.size} rows {what}, and DoRA divides by each row's "
                "norm; use lora, or leave the layer out of lora_parameters.keys."
            )


def chosen_modules(model: nn.Module, num_layers: int, keys: Iterable[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules mlx-lm adapts, with full names: by names within a block, for the last blocks, or by full names."""
    names = {id(module): name for name, module in model.named_modules()}
    wanted = None if keys is None else set(keys)
    chosen = {}
    # [-0:] is all blocks, as -1 asks for.
    for block in model.layers[-max(num_layers, 0) :]:
        for name, module in block.named_modules():
            if name in wanted if wanted is not None else hasattr(module, "to_lora") or isinstance(module, _ANY):
                chosen[names[id(module)]] = module
    if wanted is not None:
        chosen |= {name: module for name, module in model.named_modules() if name in wanted}
    return list(chosen.items())


def _check_dora(model: nn.Module, name: str, module: nn.Module, num_layers: int) -> None:
    """Make sure that mlx-lm has DoRA for a module."""
    reason = None
    if isinstance(module, _EXPERTS):
        reason = "holds the experts of a layer, which mlx-lm has no DoRA for"
    elif isinstance(module, nn.QuantizedEmbedding):
        reason = "is a quantised embedding, which mlx-lm has no DoRA for"
    elif isinstance(module, nn.QuantizedLinear) and "biases" not in module:
        reason = f"is quantised as {module.mode}, which mlx-lm's DoRA cannot read"
    elif not isinstance(module, _ANY):
        reason = f"is a {type(module).__name__}, which mlx-lm has no DoRA for"
    if reason is not None:
        linear = [
            each.rpartition(".layers.")[2].partition(".")[2]
            for each, other in chosen_modules(model, num_layers, None)
            if isinstance(other, _LINEAR) and ("biases" in other or isinstance(other, nn.Linear))
        ]
        others = ", ".join(sorted(set(linear))[:3])
        advice = f", or lora_parameters.keys without it ({others}, ...)" if others else ""
        raise ConfigError(f"`fine_tune_type=dora`: {name} {reason}; use lora{advice}.")

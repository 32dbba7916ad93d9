"""Run the activation a checkpoint was trained with, where mlx-lm's class has another one written into it.

mlx-lm's gemma and starcoder2 call the exact GELU and its gpt_neox the tanh approximation, whatever the checkpoint's
config says. The difference is up to 3e-3 nats per token on small random models: too little to see in a reply, too much
for a log-prob that is to agree with PyTorch's.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Activation = Callable[[mx.array], mx.array]

_EXACT = "gelu"
_TANH = "gelu_approx"
# By the names transformers' configs have. Its "gelu_new" and "gelu_fast" are the tanh approximation in other words.
_MLX_NAME = {"gelu": _EXACT, "gelu_pytorch_tanh": _TANH, "gelu_new": _TANH, "gelu_fast": _TANH}


def match_activation(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Make the model's layers call the GELU that `config` names; the names of the classes that called the other one.

    Only this model's layers change: each gets a subclass whose `__call__` is the same code with the other function in
    place. Layers that call no GELU by name are left alone.
    """
    wanted = _MLX_NAME.get(str(config.get("hidden_activation") or config.get("hidden_act")))
    if wanted is None:
        return []
    other = _EXACT if wanted == _TANH else _TANH
    matched: dict[type, type] = {}
    for _, module in model.named_modules():
        layer_class = type(module)
        code = getattr(layer_class.__call__, "__code__", None)
        if layer_class.__module__.startswith("mlx_lm.") and code is not None and other in code.co_names:
            if layer_class not in matched:
                matched[layer_class] = class_with_activation(layer_class, other, getattr(nn, wanted))
            # Past nn.Module's own __setattr__, which is made for parameters and submodules.
            object.__setattr__(module, "__class__", matched[layer_class])
    return sorted(layer_class.__name__ for layer_class in matched)


def class_with_activation(layer_class: type, name: str, activation: Activation) -> type:
    """A subclass that calls `activation` where `layer_class` calls `nn.<name>`.

    mlx-lm writes the activation into each class's `__call__`. A copy of those methods here would go stale with its next
    version, so the very same code object runs, in globals whose `nn` has one other function.
    """
    call: Any = layer_class.__call__
    names = {**call.__globals__, "nn": _Namespace(name, activation)}
    patched = types.FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    # Under the old name and module: mlx-lm and this package tell layers by both.
    return type(layer_class.__name__, (layer_class,), {"__call__": patched, "__module__": layer_class.__module__})


class _Namespace:
    """`mlx.nn` with one function exchanged."""

    def __init__(self, name: str, function: Activation) -> None:
        setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

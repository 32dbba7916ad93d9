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


def match_embedding_scale(model: nn.Module) -> None:
    """Have Gemma 3 multiply its embeddings with √H as the weights' dtype has it, as transformers does.

    mlx-lm rounds the factor to bfloat16 whatever the weights are: 0.2 % off in float32, for most widths.
    """
    for _, module in model.named_modules():
        if (type(module).__module__, type(module).__name__) == ("mlx_lm.models.gemma3_text", "Gemma3Model"):
            embedding = module["embed_tokens"]
            # A quantised weight is packed in whole numbers; the dtype it is run in is that of its scales.
            dtype = (embedding["scales"] if "scales" in embedding else embedding["weight"]).dtype
            names = _Namespace(mx, "bfloat16", dtype)
            object.__setattr__(module, "__class__", _class_with_names(type(module), {"mx": names}))


def class_with_activation(layer_class: type, name: str, activation: Activation) -> type:
    """A subclass that calls `activation` where `layer_class` calls `nn.<name>`.

    mlx-lm writes the activation into each class's `__call__`. A copy of those methods here would go stale with its next
    version, so the very same code object runs, in globals whose `nn` has one other function.
    """
    return _class_with_names(layer_class, {"nn": _Namespace(nn, name, activation)})


def _class_with_names(layer_class: type, names: Mapping[str, Any]) -> type:
    """A subclass whose `__call__` is the same code, with other meanings of some global names."""
    call: Any = layer_class.__call__
    patched = types.FunctionType(
        call.__code__, {**call.__globals__, **names}, call.__name__, call.__defaults__, call.__closure__
    )
    # Under the old name and module: mlx-lm and this package tell layers by both.
    return type(layer_class.__name__, (layer_class,), {"__call__": patched, "__module__": layer_class.__module__})


class _Namespace:
    """A module with one name in it exchanged."""

    def __init__(self, module: types.ModuleType, name: str, value: Any) -> None:
        self._module = module
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

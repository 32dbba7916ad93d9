"""Let layers that take an earlier layer's keys and values take them without a cache as well.

mlx-lm's Gemma 3n hands them on through the cache of a conversation and nowhere else. Called on whole rows, as for
training, its later layers use projections of their own, which no checkpoint has trained: 0.7 nats per token off on a
small random model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

_SHARING = ("mlx_lm.models.gemma3n", "LanguageModel")


class KeysOfOneCall:
    """What mlx-lm asks of a layer's cache, for a single call on whole rows: nothing was there before."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep a layer's keys and values (R, heads, L, D) for those that share them."""
        self._held = (keys, values)
        return self._held

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Those of the layer they belong to."""
        return self._held


def share_keys(model: nn.Module) -> None:
    """Have the model's layers share keys and values in every call, where its class shares them in some."""
    for _, module in model.named_modules():
        if (type(module).__module__, type(module).__name__) == _SHARING:
            # Past nn.Module's own __setattr__, which is made for parameters and submodules.
            object.__setattr__(module, "__class__", _class_that_shares(type(module)))


def _class_that_shares(kind: type) -> type:
    call: Any = kind.__call__

    def shared(module: Any, inputs: Any = None, cache: Any = None, input_embeddings: Any = None) -> Any:
        if cache is None:
            cache = [KeysOfOneCall() for _ in range(module.first_kv_shared_layer_idx)]
        return call(module, inputs, cache, input_embeddings)

    # Under the old name and module: mlx-lm and this package tell layers by both.
    return type(kind.__name__, (kind,), {"__call__": shared, "__module__": kind.__module__})

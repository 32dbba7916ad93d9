"""The load-balancing loss of mixtures of experts, which keeps a router from sending everything to a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from orpo_mlx.errors import ConfigError

# Blocks of mlx-lm whose router is one linear layer with a softmax behind it, as the loss supposes. Others (DeepSeek's,
# GLM's, LFM2's) route by a sigmoid and are balanced by a bias, without a loss.
_ROUTED = ("mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next")


class Routers:
    """Every router of a model, and what they said when it was last run.

    Args:
        model: an mlx-lm model, with its adapters.

    Raises:
        ConfigError: it has no router that this loss is defined for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks: list[Any] = [block for _, block in model.named_modules() if _is_routed(block)]
        if not self._blocks:
            raise ConfigError(
                "`router_aux_loss_coef`: this model has no experts that a softmax over one linear layer chooses; leave "
                f"it out. Known are those of {', '.join(_ROUTED)}."
            )
        self._logits: list[mx.array] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The context in which what routers say is kept; what was kept before is gone."""
        self._logits.clear()
        gates = [block["gate"] for block in self._blocks]
        try:
            for block, gate in zip(self._blocks, gates, strict=True):
                block["gate"] = self._recording(gate)
            yield
        finally:
            for block, gate in zip(self._blocks, gates, strict=True):
                block["gate"] = gate

    def loss(self, lengths: Sequence[mx.array], widths: Sequence[int]) -> mx.array:
        """`balance_loss` of all routers together over the tokens that were run, padding left out.

        Args:
            lengths: tokens of each row, for each array of rows that was run, (R,) int32.
            widths: how wide each array is.
        """
        masks = [mx.arange(width) < length[:, None] for length, width in zip(lengths, widths, strict=True)]
        # Array by array the model was run, and layer by layer in it.
        of_layers = [mask for mask in masks for _ in self._blocks]
        logits = [each.reshape(-1, each.shape[-1]) for each in self._logits]
        self._logits.clear()
        top = _experts_per_token(self._blocks[0])
        return balance_loss(mx.concatenate(logits), mx.concatenate([mask.reshape(-1) for mask in of_layers]), top)

    def _recording(self, gate: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        def call(x: mx.array) -> mx.array:
            self._logits.append(gate(x))
            return self._logits[-1]

        return call


def balance_loss(logits: mx.array, real: mx.array, experts_per_token: int) -> mx.array:
    """E Σ_e f_e P_e, without unit, float32: f_e is the share of tokens sent to expert e, P_e its mean probability.

    Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6, for several experts a token as `load_balancing_loss_func` of
    transformers has it: the f_e add up to `experts_per_token`, and the routers of all layers count as one. It is
    `experts_per_token` where all experts are used alike; its gradient goes through P alone.

    Args:
        logits: (T, E), of every router at every token.
        real: (T,) bool, which of them are no padding.
        experts_per_token: experts that each token is sent to.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    experts, kth = logits.shape[-1], experts_per_token - 1
    sent = mx.argpartition(-probabilities, kth=kth, axis=-1)[:, :experts_per_token]
    chosen = mx.stop_gradient((sent[..., None] == mx.arange(experts)).sum(axis=1))
    weights = real.astype(mx.float32)[:, None] / real.sum()
    return experts * ((weights * chosen).sum(axis=0) * (weights * probabilities).sum(axis=0)).sum()


def _is_routed(block: Any) -> bool:
    return "gate" in block and "switch_mlp" in block and type(block).__module__.rpartition(".")[2] in _ROUTED


def _experts_per_token(block: Any) -> int:
    return int(block.top_k if hasattr(block, "top_k") else block.num_experts_per_tok)

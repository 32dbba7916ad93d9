"""The memory modes: what a run keeps for the backward pass, and what it computes again. No library is imported here."""

from __future__ import annotations

from typing import NamedTuple


class Mode(NamedTuple):
    """One way to spend memory. Every mode gives the same loss and gradients."""

    help: str
    share_prompt: bool = True
    split_head: bool = True
    lean: bool = True
    """Whether layers call `patched_layers`' functions rather than mlx-lm's."""
    kept_layers: float = 1.0
    """Share of the layers, from the last, that are not run again in the backward pass."""
    kept_attention_mib: int = 8
    """A layer keeps the attention weights of one token sequence while they take no more than this."""


MODES = {
    "fast": Mode("keeps everything a backward pass wants", kept_attention_mib=16),
    "balanced": Mode("runs the first 60 % of the layers again, in segments", kept_layers=0.4),
    "thrift": Mode("runs every layer again, in segments", kept_layers=0.0),
    "plain": Mode("mlx-lm's own forward, all logits, prompts twice", share_prompt=False, split_head=False, lean=False),
}
"""From the fastest to the smallest, and the one to compare with."""

AUTOMATIC = ("fast", "balanced", "thrift")
"""What `--memory auto` chooses among, the fastest first."""

"""The records that flow from file to metrics.

NamedTuples, not dataclasses: MLX treats a tuple as a tree of arrays, so these cross `mx.compile`, `mx.checkpoint` and
`mlx.utils.tree_map` unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

States = tuple[mx.array, mx.array, mx.array]
"""States after each prompt, chosen and rejected token: (B, P, ·), (B, C, ·), (B, R, ·)."""


Message = Mapping[str, Any]
"""One chat turn: at least `role` and `content`, both text."""

Text = str | tuple[Message, ...]
"""A prompt or a completion as a plain string or as chat turns."""


class Pair(NamedTuple):
    """One preference: the same prompt, a better and a worse completion."""

    prompt: Text
    chosen: Text
    rejected: Text
    location: str
    """Where it was read, `file:line`, for error messages."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the chat template shows as tools."""
    template_kwargs: Mapping[str, Any] = {}
    """The row's own arguments for the chat template."""
    margin: float | None = None
    """Score of chosen minus score of rejected, where the row has scores."""


class TokenizedPair(NamedTuple):
    """A pair as token ids; the first completion token is predicted from the last prompt token."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    location: str = ""

    @property
    def pair_tokens(self) -> int:
        """2·prompt + chosen + rejected: the tokens of the two sequences a method compares."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


class Batch(NamedTuple):
    """B pairs, padded: prompts on the left to P columns, completions on the right to C and R columns."""

    prompt_ids: mx.array
    """(B, P) int32."""
    prompt_mask: mx.array
    """(B, P) bool: true on tokens, false on padding."""
    left_padding: mx.array | None
    """(B,) int32: padded columns before each prompt; None where no row has any."""
    chosen_ids: mx.array
    """(B, C) int32."""
    chosen_mask: mx.array
    """(B, C) bool."""
    rejected_ids: mx.array
    """(B, R) int32."""
    rejected_mask: mx.array
    """(B, R) bool."""


class PairLogProbs(NamedTuple):
    """What a loss may look at: log-probabilities (nats) of B pairs, float32, shape (B,) each."""

    chosen: mx.array
    """Σ_t log p(y_t | x, y_<t) over the chosen completion's tokens."""
    rejected: mx.array
    """The same for the rejected completion."""
    chosen_tokens: mx.array
    """Number of completion tokens of the chosen side."""
    rejected_tokens: mx.array
    """Number of completion tokens of the rejected side."""
    nll: mx.array
    """Negative log-likelihood of the chosen side in nats per token; its mean over pairs is the NLL of the batch."""
    reference_chosen: mx.array | None = None
    """`chosen` under the reference model, where the method needs one."""
    reference_rejected: mx.array | None = None
    """`rejected` under the reference model."""


class LossOutput(NamedTuple):
    """Per-pair results of a loss, float32, shape (B,) each; the batch's loss is the mean of `losses`."""

    losses: mx.array
    chosen_rewards: mx.array
    """The implicit reward r(x, y_w) the method assigns, without gradient."""
    rejected_rewards: mx.array
    chosen_logps: mx.array
    """The log-probability the method compares (mean or sum over tokens), as it is logged."""
    rejected_logps: mx.array


class Reply(NamedTuple):
    """A greedy answer to one prompt."""

    prompt: str
    text: str
    tokens: int

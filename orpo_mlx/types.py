"""The records that flow from file to metrics.

NamedTuples, not dataclasses: MLX treats a tuple as a tree of arrays, so these cross `mx.compile`, `mx.checkpoint` and
`mlx.utils.tree_map` unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

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
    weight: float = 1.0
    """What the pair's loss is multiplied by."""


class TokenizedPair(NamedTuple):
    """A pair as token ids; the first completion token is predicted from the last prompt token."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    location: str = ""
    margin: float | None = None
    """See `Pair`; so is the next."""
    weight: float = 1.0

    @property
    def pair_tokens(self) -> int:
        """2·prompt + chosen + rejected: the tokens of the two sequences a method compares."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


class Batch(NamedTuple):
    """B pairs as rows of token ids, and what is to be predicted in them. Only the right end of a row is padding."""

    prefix_ids: mx.array | None
    """(B, S) int32: the first S tokens of each prompt, which both of its completions share; None where S is 0."""
    row_ids: tuple[mx.array, ...]
    """The rest of a prompt and a completion in each row, int32: (B, W) of chosen and (B, W') of rejected completions,
    or both in one (2B, W), a pair's two rows side by side."""
    places: mx.array
    """(N,) int32: where the state is from which each wanted token is predicted, in all rows' states laid end to end and
    then the prefixes'."""
    targets: mx.array
    """(N,) int32: the wanted tokens."""
    chosen: mx.array
    """(B, N) bool: which of them are of a pair's chosen completion."""
    rejected: mx.array
    """(B, N) bool: which are of its rejected one."""
    prompt: mx.array | None
    """(B, N) bool: which are of its prompt, whose first token is never predicted; None where those are not wanted."""


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
    weight: mx.array | None = None
    """What a pair's loss is multiplied by; None for 1 everywhere."""
    margin: mx.array | None = None
    """By how much a pair's two sides are to differ, from their scores; None for 0 everywhere."""
    chosen_tail: mx.array | None = None
    """The part of `chosen` that lies behind as many tokens as the shorter completion has, where the method needs it;
    0 on the shorter side."""
    rejected_tail: mx.array | None = None
    reference_chosen_tail: mx.array | None = None
    """`chosen_tail` under the reference model."""
    reference_rejected_tail: mx.array | None = None
    chosen_alignment: mx.array | None = None
    """Mean over the chosen completion's tokens of log p(y_t) - log Σ_v p(v)², without gradient, where the method needs
    it: how close the completion is to what the policy would sample (Zhou et al. 2024, eq. 2)."""
    rejected_alignment: mx.array | None = None


class Wanted(NamedTuple):
    """What a loss looks at besides the summed log-probs of completions."""

    tails: bool = False
    """`PairLogProbs.chosen_tail` and the three like it."""
    alignment: bool = False
    """`PairLogProbs.chosen_alignment` and `rejected_alignment`."""


SUMS_ALONE = Wanted()
"""What most losses look at."""


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

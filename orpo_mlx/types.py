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
    divided_text: bool = False
    """Whether each side is prompt and completion in one text, divided where the two begin to differ."""

    @property
    def whole_text(self) -> bool:
        """See `Group`."""
        return False

    @property
    def completions(self) -> tuple[Text, ...]:
        """Both completions: a pair is a group of two."""
        return self.chosen, self.rejected


class Group(NamedTuple):
    """One prompt and K >= 1 completions, with what is known of each."""

    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float, ...]
    """Of each completion, the higher the better; of labelled ones 1 (good) or 0 (bad), of a pair's its margin and 0."""
    labelled: bool
    """Whether `scores` are labels."""
    pairs: tuple[tuple[int, int], ...]
    """The pairs a method for pairs is given: (better, worse) by their places in `completions`."""
    location: str
    """Where it was read, `file:line`, for error messages."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the chat template shows as tools."""
    template_kwargs: Mapping[str, Any] = {}
    """The row's own arguments for the chat template."""
    weight: float = 1.0
    """What the row's loss is multiplied by."""
    whole_text: bool = False
    """Whether the prompt is empty and the one completion a text by itself, as for pretraining."""

    @property
    def divided_text(self) -> bool:
        """See `Pair`."""
        return False

    @property
    def margin(self) -> float | None:
        """Score of the best minus score of the worst."""
        return None if self.labelled else max(self.scores) - min(self.scores)


class TokenizedPair(NamedTuple):
    """A pair as token ids; the first completion token is predicted from the last prompt token.

    A completion's token that is read and not learned stands there as ~id, a negative number (`data.trained_turns`).
    """

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

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """Both completions: a pair is a group of two."""
        return self.chosen_ids, self.rejected_ids

    @property
    def scores(self) -> tuple[float, ...]:
        """One good, one bad: by the margin, where it is known that the better is better, else by 1."""
        return self.margin if self.margin is not None and self.margin > 0 else 1.0, 0.0

    @property
    def labelled(self) -> bool:
        """A method for single completions takes a pair as one good and one bad."""
        return True

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The pair it is."""
        return ((0, 1),)

    @property
    def margins(self) -> tuple[float | None, ...]:
        """The margin of each of its pairs."""
        return (self.margin,)


class TokenizedGroup(NamedTuple):
    """A `Group` as token ids."""

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    labelled: bool
    pairs: tuple[tuple[int, int], ...]
    location: str = ""
    weight: float = 1.0

    @property
    def margin(self) -> float | None:
        """Score of the best minus score of the worst."""
        return None if self.labelled else max(self.scores) - min(self.scores)

    @property
    def margins(self) -> tuple[float | None, ...]:
        """Of each of its pairs, score of the better minus score of the worse."""
        return tuple(self.scores[better] - self.scores[worse] for better, worse in self.pairs)

    @property
    def pair_tokens(self) -> int:
        """K·prompt + all completions: the tokens of the K sequences a method compares."""
        return len(self.completions) * len(self.prompt_ids) + sum(map(len, self.completions))


Example = TokenizedPair | TokenizedGroup
"""What a step is made of: one prompt and its completions as token ids."""


class GroupMembers(NamedTuple):
    """Which targets of a batch belong to which completion, for methods that look at whole groups."""

    completions: mx.array
    """(B, K, N) bool: which are of each completion."""
    scores: mx.array
    """(B, K) float32, see `Group.scores`."""


class Batch(NamedTuple):
    """B prompts with K completions each (pairs: K = 2) as rows of token ids, and what is to be predicted in them. Only
    the right end of a row is padding."""

    prefix_ids: mx.array | None
    """(B, S) int32: the first S tokens of each prompt, which its completions share; None where S is 0."""
    row_ids: tuple[mx.array, ...]
    """The rest of a prompt and a completion in each row, int32: K arrays, (B, W) of first completions, (B, W') of
    second ones and so on, or all in one (K·B, W), a prompt's rows side by side. A pair's chosen completion is its
    first."""
    places: mx.array
    """(N,) int32: where the state is from which each wanted token is predicted, in all rows' states laid end to end and
    then the prefixes'."""
    targets: mx.array
    """(N,) int32: the wanted tokens."""
    chosen: mx.array
    """(P, N) bool: which of them are of a pair's chosen completion. A group of K may hold any number of pairs; one that
    holds none is taken here as its best completion and its worst."""
    rejected: mx.array
    """(P, N) bool: which are of its rejected one."""
    prompt: mx.array | None
    """(P, N) bool: which are of its prompt, whose first token is never predicted; None where those are not wanted."""
    groups: GroupMembers | None = None
    """Given where the method looks at whole groups."""


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
    groups: bool = False
    """`GroupLogProbs` in place of `PairLogProbs`."""
    kl: bool = False
    """`GroupLogProbs.kl`."""
    running: bool = False
    """`GroupLogProbs.running`."""


SUMS_ALONE = Wanted()
"""What most losses look at."""


class GroupLogProbs(NamedTuple):
    """What a loss of whole groups may look at: B groups of up to K completions, float32, shape (B, K) but where said.

    Groups of fewer completions are filled up; `tokens` is 0 there, and nothing else there means anything.
    """

    logps: mx.array
    """Σ_t log p(y_t | x, y_<t) over a completion's tokens, nats."""
    tokens: mx.array
    """Number of the completion's tokens."""
    scores: mx.array
    """See `Group.scores`."""
    reference: mx.array | None = None
    """`logps` under the reference model, where the method needs one."""
    weight: mx.array | None = None
    """(B,): what a group's losses are multiplied by; None for 1 everywhere."""
    kl: mx.array | None = None
    """(1,): the mean of log π - log π_ref over the step's mismatched prompts and completions, where the method asks."""
    running: mx.array | None = None
    """(2,): mean and number of all rewards of the steps before, where the method asks."""

    @property
    def present(self) -> mx.array:
        """(B, K) bool: which completions there are."""
        return self.tokens > 0


LogProbs = PairLogProbs | GroupLogProbs


class GroupLossOutput(NamedTuple):
    """Results of a loss of whole groups, float32, (B, K) but where said; 0 where there is no completion."""

    losses: mx.array
    """(B, K) of a loss of single completions, (B,) of one of lists; a batch's loss is the mean over completions or
    lists."""
    rewards: mx.array
    """The implicit reward r(x, y), without gradient."""
    logps: mx.array
    """The log-probability the method compares, as it is logged."""
    zero: mx.array
    """(1,): the reward above which the method takes a completion to be good."""


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

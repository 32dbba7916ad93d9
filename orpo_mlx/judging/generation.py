"""Replies to many prompts at once, on mlx-lm's batch generator; N samples of a prompt run that prompt once."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from orpo_mlx.engine.equivalence import close
from orpo_mlx.judging.requests import ROWS, Sampling
from orpo_mlx.models.adapters import in_evaluation

# mlx-lm's default: bounds the memory of a long prompt.
_PREFILL_TOKENS = 2048

Ids = Sequence[int]


class Generated(NamedTuple):
    """One reply of a model."""

    ids: tuple[int, ...]
    """Without the token that ended it."""
    text: str
    finished: bool
    """Whether it ended by itself, before `max_tokens`."""


class Drawn(NamedTuple):
    """A reply as token ids."""

    ids: list[int]
    end: int | None
    """The token that ended it, which is not among them; None where it was cut at `max_tokens`."""
    logps: mx.array | None = None
    """(T, V): the model's log-probs of the whole vocabulary, of which its T tokens were drawn, `end` among them; where
    they were to be kept."""


class StopTokens(NamedTuple):
    """A tokenizer for who draws token ids and reads no text."""

    eos_token_ids: Collection[int]


# Unequal lengths, so that one of them is padded, and one beginning.
_PROBES: tuple[tuple[int, ...], ...] = ((1, 2, 3), (1, 4, 3, 1, 2, 2))


class Generator:
    """Draws replies from a model.

    Prompts are taken in fixed groups, and the random numbers of a group depend on the seed and on its place alone: a
    group drawn again, in another process, is the same replies. Groups are as large as `rows` allows.

    Args:
        model: an mlx-lm model in any mode, which it keeps; as it is when a group is drawn, adapters on or off.
        tokenizer: mlx-lm's, or for `draw` alone `StopTokens`; its EOS tokens end a reply.
        sampling: how replies are drawn.
        samples: replies per prompt.
        rows: sequences that are generated together, at least one prompt's.
        keep_logps: whether replies have their `logps`, which are a number for each word of the vocabulary and token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sampling: Sampling,
        *,
        samples: int = 1,
        rows: int = ROWS,
        keep_logps: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._samples = samples
        self._keep_logps = keep_logps
        self.group_size = max(1, rows // samples)
        """Prompts of a group."""
        self._sampler = make_sampler(sampling.temperature, top_p=sampling.top_p)
        self._stop = set(tokenizer.eos_token_ids)
        # Dropout would make the two runs that are compared differ.
        with in_evaluation(model):
            # Samples of one prompt need it run once.
            self._pads = samples == 1 and self._batches_exactly(together=True)
            self.batches = self._pads or self._batches_exactly(together=False)
        """Whether several sequences are run at once; a model whose rows then differ is asked for one at a time."""

    def groups(self, prompts: Sequence[Ids], first: int = 0) -> Iterator[list[list[Generated]]]:
        """The replies to each group of `prompts` in turn, from group number `first`: `samples` for each prompt."""
        for number, group in enumerate(self.split(prompts)[first:], first):
            yield self.group(group, number)

    def split(self, prompts: Sequence[Ids]) -> list[Sequence[Ids]]:
        """The groups of `prompts`, by number."""
        return [prompts[start : start + self.group_size] for start in range(0, len(prompts), self.group_size)]

    def replies(
        self, prompts: Sequence[Ids], progress: Callable[[int], None] = lambda done: None
    ) -> list[list[Generated]]:
        """The replies to all prompts, `samples` each; `progress` is called with the number of prompts done."""
        found: list[list[Generated]] = []
        for group in self.groups(prompts):
            found += group
            progress(len(found))
        return found

    def group(self, prompts: Sequence[Ids], number: int) -> list[list[Generated]]:
        """The replies to the prompts of one group, whose random numbers are those of `number`."""
        replies = [self.reply(row) for row in self.draw(prompts, number)]
        return [replies[start : start + self._samples] for start in range(0, len(replies), self._samples)]

    def draw(self, prompts: Sequence[Ids], number: int) -> list[Drawn]:
        """As `group`, as token ids: all samples of the first prompt, then those of the second."""
        mx.random.seed(seed_of(self._sampling.seed, number))
        with in_evaluation(self._model):
            return self._together(prompts) if self.batches else self._one_by_one(prompts)

    def reply(self, row: Drawn) -> Generated:
        """What `draw` found, as text."""
        return Generated(tuple(row.ids), str(self._tokenizer.decode(row.ids)).strip(), row.end is not None)

    def _together(self, prompts: Sequence[Ids]) -> list[Drawn]:
        rows = [prompt for prompt in prompts for _ in range(self._samples)]
        with closing(self._batch_generator(len(rows))) as generator:
            together = self._pads and little_padding(prompts)
            uids = self._insert(generator, prompts, self._samples, self._sampling.max_tokens, together=together)
            drawn: dict[int, list[int]] = {uid: [] for uid in uids}
            ends: dict[int, int] = {}
            logps: dict[int, list[mx.array]] = {uid: [] for uid in uids}
            while responses := generator.next_generated():
                for response in responses:
                    if self._keep_logps:
                        logps[response.uid].append(response.logprobs)
                    if response.finish_reason == "stop":
                        ends[response.uid] = int(response.token)
                    else:
                        drawn[response.uid].append(int(response.token))
        return [Drawn(drawn[uid], ends.get(uid), _stacked(logps[uid])) for uid in uids]

    def _batch_generator(self, rows: int) -> BatchGenerator:
        return BatchGenerator(
            self._model,
            stop_tokens=[[token] for token in self._stop],
            sampler=self._sampler,
            # All of a group at once: a row that waited for another to end would shift everybody's random numbers.
            completion_batch_size=rows,
            prefill_batch_size=rows,
            prefill_step_size=max(1, _PREFILL_TOKENS // rows),
        )

    def _batches_exactly(self, *, together: bool) -> bool:
        """Whether two short prompts in one batch have the log-probs that each has by itself, for two tokens."""
        # mlx-lm's batch generator fails on some models (Gemma 2) and could be wrong in silence on others: its caches
        # are joined and padded, and each architecture has to heed that.
        uids: list[int] = []
        logps: dict[int, list[mx.array]] = {}
        tokens: dict[int, list[int]] = {}
        try:
            with closing(BatchGenerator(self._model)) as generator:
                uids = self._insert(generator, _PROBES, 1, 2, together=together)
                while responses := generator.next_generated():
                    for response in responses:
                        logps.setdefault(response.uid, []).append(response.logprobs)
                        tokens.setdefault(response.uid, []).append(int(response.token))
        # Whatever an architecture raises there, its prompts can be run singly.
        except Exception:
            return False
        for uid, probe in zip(uids, _PROBES, strict=True):
            plain = self._model(mx.array([[*probe, *tokens[uid][:-1]]]))[0, len(probe) - 1 :]
            if not close(mx.stack(logps[uid]), nn.log_softmax(plain, axis=-1)):
                return False
        return True

    def _insert(
        self, generator: BatchGenerator, prompts: Sequence[Ids], samples: int, most: int, *, together: bool
    ) -> list[int]:
        """Give mlx-lm `samples` of each prompt, as far as they are run already; its numbers of them.

        `together`: what all prompts begin with (a system turn) is run once, and mlx-lm runs the rest of all at once,
        padded. Otherwise each prompt is run by itself, once for all its samples.
        """
        starts = [common_start(prompts) if together else len(prompt) - 1 for prompt in prompts]
        caches = (
            [self._run(prompts[0][: starts[0]])] * len(prompts)
            if together
            else [self._run(prompt[:-1]) for prompt in prompts]
        )
        rows = [
            (list(prompt[start:]), cache)
            for prompt, start, cache in zip(prompts, starts, caches, strict=True)
            for _ in range(samples)
        ]
        # Joining caches copies them, so that rows may all be given the very same one.
        return list(generator.insert([row for row, _ in rows], [most] * len(rows), caches=[cache for _, cache in rows]))

    def _run(self, ids: Ids) -> list[Any]:
        """The cache of what a prompt begins with, from which generation goes on."""
        cache = make_prompt_cache(self._model)
        for start in range(0, len(ids), _PREFILL_TOKENS):
            self._model(mx.array([list(ids[start : start + _PREFILL_TOKENS])]), cache=cache)
            # Now, or the graph of all pieces would be kept until the last one and nothing be saved by taking pieces.
            mx.eval([each.state for each in cache])
        return list(cache)

    def _one_by_one(self, prompts: Sequence[Ids]) -> list[Drawn]:
        return [self._alone(prompt) for prompt in prompts for _ in range(self._samples)]

    def _alone(self, prompt: Ids) -> Drawn:
        most = self._sampling.max_tokens
        ids: list[int] = []
        logps: list[mx.array] = []
        for token, found in generate_step(mx.array(list(prompt)), self._model, max_tokens=most, sampler=self._sampler):
            if self._keep_logps:
                logps.append(found)
            if int(token) in self._stop:
                return Drawn(ids, int(token), _stacked(logps))
            ids.append(int(token))
        return Drawn(ids, None, _stacked(logps))


def _stacked(rows: list[mx.array]) -> mx.array | None:
    return mx.stack(rows) if rows else None


def common_start(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with; each keeps one at least that comes after them."""
    shortest = min(map(len, prompts)) - 1
    alike = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    return min(shortest, sum(1 for _ in itertools.takewhile(bool, alike)))


def little_padding(prompts: Sequence[Ids]) -> bool:
    """Whether running prompts together, padded to the longest, is at most a quarter more than each by itself."""
    lengths = [len(prompt) - common_start(prompts) for prompt in prompts]
    return len(lengths) * max(lengths) <= 1.25 * sum(lengths)


def seed_of(*parts: object) -> int:
    """A seed of 64 bits for each different `parts`."""
    # A hash and no sum: group 1 of seed 0 would have the numbers of group 0 of seed 1.
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")

"""From text to token ids: the only place that decides which ids are prompt and which completion.

The rules, with what each guards against, are in docs/data.md. In short: what the model sees in training is what it sees
when it is asked, the assistant's header is given and not learned, the prompt's tokens are the beginning of the whole
row's, and a completion ends in EOS once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, overload

from orpo_mlx.data.tokens.chat_template import PairRenderer, RenderedTexts
from orpo_mlx.data.tokens.token_codec import Ids, TokenCodec
from orpo_mlx.data.tokens.trained_turns import TRAINED_TURNS, Stretch, learned_ids, marked
from orpo_mlx.errors import DataError
from orpo_mlx.types import Example, Group, Pair, TokenizedGroup, TokenizedPair

PROMPT_SHORTENED = "whose prompt ends some tokens earlier, since the tokenizer joins its end with the answer"

# Pairs that are rendered while the texts of as many others are encoded: large enough for the encoder's threads, small
# enough that memory does not grow with the data.
_CHUNK = 256

Row = Pair | Group | Example
Outcome = Example | DataError


class _Chunk(NamedTuple):
    """Some rows on their way to token ids."""

    rows: list[Row]
    texts: list[RenderedTexts | DataError | None]
    """None where the row is token ids, an error where it cannot be rendered."""
    ids: Future[list[list[Ids]]]
    """Of each row's texts; empty where it has none."""


class PairTokenizer:
    """Turns `Pair`s and `Group`s into token ids with one tokenizer, or passes on what is token ids already.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or None for a model folder without a tokenizer.
        train_on: what is learned of completions of several turns, one of `TRAINED_TURNS`.
        template_strings: see `PairRenderer`.
    """

    def __init__(
        self, tokenizer: Any | None, train_on: str = TRAINED_TURNS[0], *, template_strings: bool = True
    ) -> None:
        self._train_on = train_on
        self._codec = TokenCodec(tokenizer)
        self._renderer = PairRenderer(tokenizer, self._codec.eos_texts, template_strings=template_strings)
        self.has_template = self._renderer.has_template
        self.notes: dict[str, tuple[str, ...]] = {}
        """What to know about how rows were taken, by their location; for who counts, and takes them out."""

    @overload
    def __call__(self, row: Pair | TokenizedPair) -> TokenizedPair: ...
    @overload
    def __call__(self, row: Group | TokenizedGroup) -> TokenizedGroup: ...
    def __call__(self, row: Row) -> Example:
        """Token ids of one pair or group.

        Raises:
            DataError: text without a tokenizer, a conversation without a chat template, a template that fails or
                renders the prompt differently once the answer follows, or an empty prompt.
        """
        return next(self.each([row]))

    def each(self, rows: Iterable[Row]) -> Iterator[Example]:
        """Token ids of each pair or group.

        Raises:
            DataError: the first one that has none, see `__call__`.
        """
        for outcome in self.outcomes(rows):
            if isinstance(outcome, DataError):
                raise outcome
            yield outcome

    def outcomes(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Token ids of each pair or group, or why it has none; texts are rendered while others are encoded."""
        iterator = iter(rows)
        # One thread, which waits for the encoder: that has threads of its own.
        with ThreadPoolExecutor(1) as pool:
            encoding: _Chunk | None = None
            while chunk := list(itertools.islice(iterator, _CHUNK)):
                rendered = [self._rendered(row) for row in chunk]
                future = pool.submit(self._encoded, rendered)
                if encoding is not None:
                    yield from self._finished(encoding)
                encoding = _Chunk(chunk, rendered, future)
            if encoding is not None:
                yield from self._finished(encoding)

    def prompt_ids(self, pair: Pair | Group) -> Ids:
        """Token ids of a row's prompt as generation would start from it.

        Raises:
            DataError: see `__call__`.
        """
        templated = self._renderer.is_templated(pair)
        (ids,) = self._codec.encode([self._renderer.prompt(pair)], special=not templated)
        return ids if templated else self._codec.open_prompt(ids)

    def _rendered(self, row: Row) -> RenderedTexts | DataError | None:
        if isinstance(row, Example):
            return None
        try:
            texts = self._renderer.texts(row, self._train_on)
            "".join((texts.prompt, *texts.whole)).encode("utf-8")
        except DataError as error:
            return error
        except UnicodeEncodeError as error:  # In a role, a tool or another part that only the template looks at.
            code = ascii(error.object[error.start])
            return DataError(f"{row.location}: the row holds half of a surrogate pair ({code}), which is not text.")
        return texts

    def _encoded(self, rendered: Sequence[RenderedTexts | DataError | None]) -> list[list[Ids]]:
        """Ids of the texts of each row that has some, the prompt's first."""
        found: list[list[Ids]] = [[] for _ in rendered]
        # Apart, since the tokenizer adds BOS and EOS to all texts of a call or to none.
        for templated in (True, False):
            texts = [
                (number, text)
                for number, item in enumerate(rendered)
                if isinstance(item, RenderedTexts) and item.templated == templated
                for text in (item.prompt, *item.whole)
            ]
            every = self._codec.encode([text for _, text in texts], special=not templated)
            for (number, _), ids in zip(texts, every, strict=True):
                found[number].append(ids)
        return found

    def _finished(self, chunk: _Chunk) -> Iterator[Outcome]:
        for row, texts, ids in zip(chunk.rows, chunk.texts, chunk.ids.result(), strict=True):
            if isinstance(row, Example):
                yield row
            elif isinstance(texts, DataError):
                yield texts
            else:
                assert texts is not None
                try:
                    yield self._divided(row, texts, *ids)
                except DataError as error:
                    yield error

    def _divided(self, row: Pair | Group, texts: RenderedTexts, prompt: Ids, *whole: Ids) -> Example:
        """Prompt and completions apart, from the ids of `texts`."""
        if isinstance(row, Group) and row.whole_text:
            # As mlx_lm.lora takes it: all is learned but the first token, which nothing comes before.
            ids = self._codec.closed(whole[0])
            return TokenizedGroup(ids[:1], (ids[1:],), row.scores, True, row.pairs, row.location, row.weight)
        prompt = prompt if texts.templated else self._codec.open_prompt(prompt)
        notes = texts.notes
        completions = [
            self._completion(prompt, text[len(texts.prompt) :], ids)
            for text, ids in zip(texts.whole, whole, strict=True)
        ]
        if None in completions:
            # What is left where a tokenizer changes text: the tokens that all begin with.
            shared = min(_common_tokens(prompt, ids) for ids in whole)
            prompt = prompt[:shared]
            completions = [ids[shared:] for ids in whole]
            notes = (*notes, PROMPT_SHORTENED)
        if not prompt:
            raise DataError(
                f"{row.location}: the prompt has no tokens, so the first completion token has nothing to follow."
            )
        if notes:
            self.notes[row.location] = notes
        closed = tuple(self._codec.closed(completion) for completion in completions if completion is not None)
        if any(learned is not None for learned in texts.learned):
            every = zip(closed, texts.whole, whole, texts.learned, strict=True)
            closed = tuple(
                ids if learned is None else self._marked(row, ids, text, of_text, len(texts.prompt), learned)
                for ids, text, of_text, learned in every
            )
        if isinstance(row, Pair):
            chosen, rejected = closed
            return TokenizedPair(prompt, chosen, rejected, row.location, row.margin, row.weight)
        return TokenizedGroup(prompt, closed, row.scores, row.labelled, row.pairs, row.location, row.weight)

    def _marked(
        self, row: Pair | Group, ids: Ids, text: str, of_text: Ids, begin: int, learned: Sequence[Stretch]
    ) -> Ids:
        """The ids of a completion that begins at a character of `text`, learned in some stretches of that text."""
        starts = self._codec.starts(text)
        if starts is None:
            raise DataError(
                f"{row.location}: this tokenizer does not tell where in a text its tokens stand, which a completion of "
                "several turns needs; give `train_on=all`, or a checkpoint with a tokenizer.json."
            )
        # An EOS that was appended belongs to the text's end.
        appended = int(ids[-1:] != of_text[-1:])
        rest = ids[: len(ids) - appended]
        # From the end: what straddles the boundary to the prompt may be other tokens in the whole text.
        same = _common_tokens(rest[::-1], of_text[::-1])
        places = [begin] * (len(rest) - same) + starts[len(starts) - same :] + [len(text) - 1] * appended
        found = marked(ids, places, learned)
        if not learned_ids(found):
            raise DataError(
                f"{row.location}: a completion has no turn of the assistant to train on; `train_on=all` trains on the "
                "turns of others."
            )
        return found

    def _completion(self, prompt: Ids, text: str, whole: Ids) -> Ids | None:
        """The ids of a completion's `text`, given those of the `whole`; None where none go on from the prompt's."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # A token straddles the boundary. Generation starts from the prompt's own tokens, so the rest is encoded as
        # what goes on from them, where that spells the same text.
        wanted = self._codec.decode(whole)
        continuations = self._codec.continuations(text)
        return next((rest for rest in continuations if self._codec.decode((*prompt, *rest)) == wanted), None)


def _common_tokens(first: Ids, second: Ids) -> int:
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False))
    return sum(1 for _ in same)

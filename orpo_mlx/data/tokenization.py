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

from orpo_mlx.data.chat_template import PairRenderer, RenderedTexts
from orpo_mlx.data.token_codec import Ids, TokenCodec
from orpo_mlx.errors import DataError
from orpo_mlx.types import Example, Group, Pair, TokenizedGroup, TokenizedPair

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
    ids: Future[list[Ids]]
    """Of every text, one after another."""


class PairTokenizer:
    """Turns `Pair`s and `Group`s into token ids with one tokenizer, or passes on what is token ids already.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or None for a model folder without a tokenizer.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._codec = TokenCodec(tokenizer)
        self._renderer = PairRenderer(tokenizer, self._codec.eos_texts)
        self.folds_system = self._renderer.folds_system

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
        with ThreadPoolExecutor(1) as pool:
            encoding: _Chunk | None = None
            while chunk := list(itertools.islice(iterator, _CHUNK)):
                rendered = [self._rendered(row) for row in chunk]
                texts = [
                    text for item in rendered if isinstance(item, RenderedTexts) for text in (item.prompt, *item.whole)
                ]
                future = pool.submit(self._codec.encode, texts)
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
        return self._codec.open_prompt(self._codec.encode([self._renderer.prompt(pair)])[0])

    def _rendered(self, row: Row) -> RenderedTexts | DataError | None:
        if isinstance(row, Example):
            return None
        try:
            texts = self._renderer.texts(row)
            "".join((texts.prompt, *texts.whole)).encode("utf-8")
        except DataError as error:
            return error
        except UnicodeEncodeError as error:  # In a role, a tool or another part that only the template looks at.
            code = ascii(error.object[error.start])
            return DataError(f"{row.location}: the row holds half of a surrogate pair ({code}), which is not text.")
        return texts

    def _finished(self, chunk: _Chunk) -> Iterator[Outcome]:
        ids = iter(chunk.ids.result())
        for row, texts in zip(chunk.rows, chunk.texts, strict=True):
            if isinstance(row, Example):
                yield row
            elif isinstance(texts, DataError):
                yield texts
            else:
                assert texts is not None
                prompt, *whole = (next(ids) for _ in range(1 + len(texts.whole)))
                try:
                    yield self._divided(row, texts, prompt, whole)
                except DataError as error:
                    yield error

    def _divided(self, row: Pair | Group, texts: RenderedTexts, prompt: Ids, whole: Sequence[Ids]) -> Example:
        """Prompt and completions apart, from the ids of `texts`."""
        prompt = self._codec.open_prompt(prompt)
        if not prompt:
            raise DataError(
                f"{row.location}: the prompt has no tokens, so the first completion token has nothing to follow."
            )
        completions = []
        for text, ids in zip(texts.whole, whole, strict=True):
            completion = self._completion(prompt, texts.prompt, text, ids)
            if completion is None:
                raise DataError(
                    f"{row.location}: the chat template renders the prompt differently once the answer follows, so the "
                    "boundary between them is unknown; use a template that does not rewrite earlier turns, or token "
                    "ids."
                )
            completions.append(self._codec.closed(completion))
        if isinstance(row, Pair):
            chosen, rejected = completions
            return TokenizedPair(prompt, chosen, rejected, row.location, row.margin, row.weight)
        scored = (row.scores, row.labelled, row.pairs)
        return TokenizedGroup(prompt, tuple(completions), *scored, row.location, row.weight)

    def _completion(self, prompt: Ids, prompt_text: str, text: str, ids: Ids) -> Ids | None:
        """The ids of `text` after the prompt's; None where the boundary cannot be found."""
        if ids[: len(prompt)] == prompt:
            return ids[len(prompt) :]
        if text.startswith(prompt_text):
            # A token straddles the boundary. Generation starts from the prompt's own tokens, so the rest is encoded by
            # itself, where that spells the same text.
            (rest,) = self._codec.encode([text[len(prompt_text) :]], special=False)
            if self._codec.decode((*prompt, *rest)) == self._codec.decode(ids):
                return rest
        return None

"""Text to token ids and back with one tokenizer, each with BOS and EOS once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orpo_mlx.text import printable

Ids = tuple[int, ...]

# No template writes more tokens of white space after an EOS, and the table of those seen stays small.
_MOST_BLANK = 8

# What a text is put behind: characters that hardly any tokenizer joins with what follows.
_GUARDS = ("\n", "\u3002", "a", "0")


class TokenCodec:
    """Encodes and decodes with one tokenizer.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or None for a model folder without one, whose rows are token ids.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._backend = backend_of(tokenizer)
        self._bos = tokenizer.bos_token_id if tokenizer is not None else None
        self._eos = set(tokenizer.eos_token_ids) if tokenizer is not None else set()
        self.eos_texts = tuple(filter(None, (self.decode((token,)) for token in sorted(self._eos))))
        self._blank: dict[Ids, bool] = {}

    def encode(self, texts: list[str], *, special: bool) -> list[Ids]:
        """Ids of each text; `special`: whether the tokenizer adds BOS and EOS, since no template has."""
        if not texts:
            return []
        assert self._tokenizer is not None
        if self._backend is not None:
            rows = [text.ids for text in self._backend.encode_batch_fast(texts, add_special_tokens=special)]
        else:
            rows = self._tokenizer._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return [self._with_one_bos(tuple(row)) for row in rows]

    def starts(self, text: str) -> list[int] | None:
        """Where each id of a text that a template has written begins in it; None of a tokenizer that does not tell."""
        if self._backend is None:
            return None
        encoding = self._backend.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        # Where a second BOS was taken off the ids, its place goes as well.
        return starts[len(starts) - len(self._with_one_bos(tuple(encoding.ids))) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids))) if self._tokenizer is not None and ids else ""

    def continuations(self, text: str) -> Iterator[Ids]:
        """Ids of a text that goes on from another: by itself, and behind guards.

        SentencePiece puts a space before what it takes for the beginning of a text; behind a guard it is none.
        """
        yield from self.encode([text], special=False)
        for guard in _GUARDS:
            alone, guarded = self.encode([guard, guard + text], special=False)
            # Or the guard has become part of the text's first token.
            if guarded[: len(alone)] == alone:
                yield guarded[len(alone) :]

    def open_prompt(self, ids: Ids) -> Ids:
        """A prompt's ids without EOS: some tokenizers close every text with it, and a prompt is not closed yet."""
        # BOS and EOS may be one token; then nothing tells that a text was closed with it, and it stays.
        while len(ids) > 1 and ids[-1] in self._eos and ids[-1] != self._bos:
            ids = ids[:-1]
        return ids

    def closed(self, ids: Ids) -> Ids:
        """A completion's ids ending in EOS: as rendered (white space may follow it), or with EOS appended."""
        tail = next((back for back, token in enumerate(reversed(ids)) if token in self._eos), None)
        if tail is not None and self._is_blank(ids[len(ids) - tail :]):
            return ids
        eos = self._tokenizer.eos_token_id if self._tokenizer is not None else None
        return ids if eos is None else (*ids, eos)

    def _with_one_bos(self, ids: Ids) -> Ids:
        # Templates write BOS themselves, and some tokenizers add theirs whatever they are asked.
        return ids[1:] if self._bos is not None and ids[:2] == (self._bos, self._bos) else ids

    def _is_blank(self, ids: Ids) -> bool:
        if len(ids) > _MOST_BLANK:
            return False
        if ids not in self._blank:
            self._blank[ids] = not self.decode(ids).strip()
        return self._blank[ids]


def show_tokens(ids: Sequence[int], tokenizer: Any | None, *, most: int = 600) -> str:
    """Ids as one line of text, special tokens included, the middle left out where it is long, nothing unprintable."""
    text = " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids))).replace("\n", "↵")
    if len(text) > most:
        text = f"{text[: most // 2]} [...] {text[-most // 2 :]}"
    return printable(text)


def backend_of(tokenizer: Any | None) -> Any | None:
    """The Rust tokenizer inside, half the time without transformers' bookkeeping; None where there is none."""
    backend = getattr(getattr(tokenizer, "_tokenizer", None), "backend_tokenizer", None)
    if backend is not None:
        # Whatever the checkpoint's tokenizer.json says: rows are cut and padded here, and counted.
        backend.no_truncation()
        backend.no_padding()
    return backend

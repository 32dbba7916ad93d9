"""From text to token ids: the only place that decides which ids are prompt and which completion.

The rules, with what each guards against, are in docs/data.md. In short: what the model sees in training is what it sees
when it is asked, the assistant's header is given and not learned, the prompt's tokens are the beginning of the whole
row's, and a completion ends in EOS once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orpo_mlx.data.messages import as_turns
from orpo_mlx.errors import DataError, reason_of
from orpo_mlx.text import printable
from orpo_mlx.types import Message, Pair, Text, TokenizedPair

_CHUNK = 256
_MARK = "Zq1"  # A text no template writes by itself.

Outcome = TokenizedPair | DataError
_Rendered = tuple[str, str, str] | DataError | None


class PairTokenizer:
    """Turns `Pair`s into `TokenizedPair`s with one tokenizer, or passes on pairs that are token ids already.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or None for a model folder without a tokenizer.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._has_template = tokenizer is not None and tokenizer.has_chat_template
        self._eos = set(tokenizer.eos_token_ids) if tokenizer is not None else set()
        self._eos_texts = tuple(filter(None, (self._decode((token,)) for token in sorted(self._eos))))
        self._bos = tokenizer.bos_token_id if tokenizer is not None else None
        self._blank: dict[tuple[int, ...], bool] = {}
        # A template without a system role gets the system text at the head of the first turn.
        self.folds_system = self._has_template and self._lacks_system_role()
        self._stray = self._stray_header() if self._has_template else ""

    def __call__(self, pair: Pair | TokenizedPair) -> TokenizedPair:
        """Token ids of one pair.

        Raises:
            DataError: text without a tokenizer, a conversation without a chat template, a template that fails or
                renders the prompt differently once the answer follows, or an empty prompt.
        """
        return next(self.each([pair]))

    def each(self, pairs: Iterable[Pair | TokenizedPair]) -> Iterator[TokenizedPair]:
        """Token ids of each pair.

        Raises:
            DataError: the first pair that has none, see `__call__`.
        """
        for outcome in self.batches(pairs):
            if isinstance(outcome, DataError):
                raise outcome
            yield outcome

    def batches(self, pairs: Iterable[Pair | TokenizedPair]) -> Iterator[Outcome]:
        """Token ids of each pair, or why it has none; texts are rendered while others are encoded."""
        iterator = iter(pairs)
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[Any, ...] | None = None
            while chunk := list(itertools.islice(iterator, _CHUNK)):
                rendered = [self._rendered(pair) for pair in chunk]
                texts = [text for item in rendered if isinstance(item, tuple) for text in item]
                future = pool.submit(self._encode, texts)
                if waiting is not None:
                    yield from self._joined(*waiting)
                waiting = (chunk, rendered, future)
            if waiting is not None:
                yield from self._joined(*waiting)

    def prompt_ids(self, pair: Pair) -> tuple[int, ...]:
        """Token ids of a pair's prompt as generation would start from it.

        Raises:
            DataError: see `__call__`.
        """
        return self._open(self._encode([self._prompt_text(pair)])[0])

    def _rendered(self, pair: Pair | TokenizedPair) -> _Rendered:
        """The texts of prompt, prompt + chosen, prompt + rejected; None where the row is token ids."""
        if isinstance(pair, TokenizedPair):
            return None
        try:
            texts = self._texts(pair)
            "".join(texts).encode("utf-8")
        except DataError as error:
            return error
        except UnicodeEncodeError as error:  # In a role, a tool or another part that only the template looks at.
            code = ascii(error.object[error.start])
            return DataError(f"{pair.location}: the row holds half of a surrogate pair ({code}), which is not text.")
        return texts

    def _joined(self, chunk: Sequence[Any], rendered: Sequence[_Rendered], future: Any) -> Iterator[Outcome]:
        ids = iter(future.result())
        for pair, texts in zip(chunk, rendered, strict=True):
            if not isinstance(texts, tuple):
                yield pair if texts is None else texts
                continue
            whole = [next(ids) for _ in texts]
            try:
                yield self._pair(pair, texts, whole)
            except DataError as error:
                yield error

    def _pair(self, pair: Pair, texts: tuple[str, str, str], ids: list[tuple[int, ...]]) -> TokenizedPair:
        prompt = self._open(ids[0])
        if not prompt:
            raise DataError(
                f"{pair.location}: the prompt has no tokens, so the first completion token has nothing to follow."
            )
        chosen, rejected = (
            self._closed(self._after(prompt, texts[0], text, whole, pair.location))
            for text, whole in zip(texts[1:], ids[1:], strict=True)
        )
        return TokenizedPair(prompt, chosen, rejected, pair.location)

    def _after(
        self, prompt: tuple[int, ...], prompt_text: str, text: str, ids: tuple[int, ...], location: str
    ) -> tuple[int, ...]:
        """The completion's ids: those after the prompt's."""
        if ids[: len(prompt)] == prompt:
            return ids[len(prompt) :]
        if text.startswith(prompt_text):
            # A token straddles the boundary. Generation starts from the prompt's own tokens, so the rest is encoded by
            # itself, where that spells the same text.
            (rest,) = self._encode([text[len(prompt_text) :]], special=False)
            if self._decode((*prompt, *rest)) == self._decode(ids):
                return rest
        raise DataError(
            f"{location}: the chat template renders the prompt differently once the answer follows, so the boundary "
            "between them is unknown; use a template that does not rewrite earlier turns, or token ids."
        )

    def _prompt_text(self, pair: Pair) -> str:
        if self._tokenizer is None:
            raise DataError(
                f"{pair.location}: the row is text but the model has no tokenizer; give prompt_ids, chosen_ids and "
                "rejected_ids."
            )
        if not self._has_template:
            return _plain(pair.prompt, pair.location)
        return self._render(pair, as_turns(pair.prompt, "user"), add_generation_prompt=True)

    def _texts(self, pair: Pair) -> tuple[str, str, str]:
        prompt = self._prompt_text(pair)
        chosen, rejected = (
            self._full_text(pair, prompt, self._without_eos(side)) for side in (pair.chosen, pair.rejected)
        )
        return prompt, chosen, rejected

    def _full_text(self, pair: Pair, prompt: str, side: Text) -> str:
        if not self._has_template:
            return prompt + _plain(side, pair.location)
        turns = (*as_turns(pair.prompt, "user"), *as_turns(side, "assistant"))
        return self._render(pair, turns, add_generation_prompt=False).removesuffix(self._stray)

    def _render(self, pair: Pair, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        turns = [dict(message) for message in messages]
        extras = {"tools": [dict(tool) for tool in pair.tools] or None, **pair.template_kwargs}
        try:
            return self._template(_folded(turns) if self.folds_system else turns, add_generation_prompt, **extras)
        except Exception as error:  # Templates raise whatever they like, jinja2's errors among others.
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            raise DataError(
                f"{pair.location}: the chat template refused the turns ({roles}): {reason_of(error, first_line=True)}."
            ) from error

    def _template(self, turns: list[dict[str, Any]], add_generation_prompt: bool, **extras: Any) -> str:
        assert self._tokenizer is not None
        return str(
            self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, tokenize=False, **extras
            )
        )

    def _encode(self, texts: list[str], *, special: bool | None = None) -> list[tuple[int, ...]]:
        """Ids of each text. A template writes BOS itself; without one, the tokenizer adds it."""
        if not texts:
            return []
        assert self._tokenizer is not None
        special = not self._has_template if special is None else special
        if self._backend is not None:
            rows = [text.ids for text in self._backend.encode_batch_fast(texts, add_special_tokens=special)]
        else:
            rows = self._tokenizer._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return [self._one_bos(tuple(row)) for row in rows]

    def _one_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[1:] if self._bos is not None and ids[:2] == (self._bos, self._bos) else ids

    def _open(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """A prompt's ids: some tokenizers close every text with EOS, and a prompt is not closed yet."""
        while not self._has_template and len(ids) > 1 and ids[-1] in self._eos and ids[-1] != self._bos:
            ids = ids[:-1]
        return ids

    def _closed(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """`ids` ending in EOS: as rendered (white space may follow it), or with EOS appended."""
        tail = next((back for back, token in enumerate(reversed(ids)) if token in self._eos), None)
        if tail is not None and self._is_blank(ids[len(ids) - tail :]):
            return ids
        eos = self._tokenizer.eos_token_id if self._tokenizer is not None else None
        return ids if eos is None else (*ids, eos)

    def _is_blank(self, ids: tuple[int, ...]) -> bool:
        if len(ids) > 8:
            return False  # No template writes so much white space, and the table below stays small.
        if ids not in self._blank:
            self._blank[ids] = not self._decode(ids).strip()
        return self._blank[ids]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids))) if self._tokenizer is not None and ids else ""

    def _without_eos(self, text: Text) -> Text:
        """A completion whose own text ends in EOS would get another."""
        if not isinstance(text, str):
            content = self._without_eos(text[-1]["content"])
            return text if content == text[-1]["content"] else (*text[:-1], {**text[-1], "content": content})
        for eos in self._eos_texts:
            if text.rstrip().endswith(eos):
                return text.rstrip().removesuffix(eos)
        return text

    def _lacks_system_role(self) -> bool:
        """Whether the template refuses a system turn, or leaves it out in silence."""
        user = {"role": "user", "content": "Hi"}
        try:
            self._template([user], True)
        except Exception:  # A template that takes nothing is named with the first row.
            return False
        try:
            return _MARK not in self._template([{"role": "system", "content": _MARK}, user], True)
        except Exception:
            return True

    def _stray_header(self) -> str:
        """What the template writes after a finished answer beyond its EOS: the next turn's header, asked for or not."""
        try:
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}]
            after = self._template(turns, False).rpartition(_MARK)[2]
        except Exception:  # As above.
            return ""
        _, eos, rest = min(
            (after.partition(text) for text in self._eos_texts), key=lambda cut: len(cut[0]), default=("",) * 3
        )
        blank = len(rest) - len(rest.lstrip())
        return rest[blank:] if eos else ""


def show_tokens(ids: Sequence[int], tokenizer: Any | None, *, most: int = 600) -> str:
    """Ids as one line of text, special tokens included, the middle left out where it is long, nothing unprintable."""
    text = " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids))).replace("\n", "↵")
    if len(text) > most:
        text = f"{text[: most // 2]} [...] {text[-most // 2 :]}"
    return printable(text)


def _backend(tokenizer: Any | None) -> Any | None:
    """The Rust tokenizer inside, half the time without transformers' bookkeeping; None where there is none."""
    backend = getattr(getattr(tokenizer, "_tokenizer", None), "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend


def _plain(text: Text, location: str) -> str:
    if not isinstance(text, str):
        raise DataError(
            f"{location}: the row is a conversation but the tokenizer has no chat template; give plain strings."
        )
    return text


def _folded(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns whose system text stands at the head of the first turn after it."""
    if len(turns) < 2 or turns[0].get("role") != "system":
        return turns
    first = {**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [first, *turns[2:]]

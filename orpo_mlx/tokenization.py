"""From text to token ids: the only place that decides which ids are prompt and which completion.

- Messages go through the tokenizer's chat template; strings become one user and one assistant turn. The model sees in
  training what it sees when it is asked.
- `add_generation_prompt=True` for the prompt only: the assistant's header is given, not learned.
- The completion is what the full render adds to the prompt's render; refused where the prompt is not a prefix of it.
- EOS is in the completion: as the template writes it (with the white space it writes after it), or appended once where
  it writes none. A model that never sees EOS never stops.
- Without a chat template, prompt and completion are encoded apart and joined, so that the prompt's last token is the
  one generation starts from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from orpo_mlx.errors import DataError
from orpo_mlx.types import Message, Pair, Text, TokenizedPair


class PairTokenizer:
    """Turns `Pair`s into `TokenizedPair`s with one tokenizer, or passes on pairs that are token ids already.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or None for a model folder without a tokenizer.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._has_template = tokenizer is not None and tokenizer.has_chat_template
        self._eos = set(tokenizer.eos_token_ids) if tokenizer is not None else set()

    def __call__(self, pair: Pair | TokenizedPair) -> TokenizedPair:
        """Token ids of one pair.

        Raises:
            DataError: text without a tokenizer, a conversation without a chat template, a template that fails or
                renders the prompt differently once the answer follows, or an empty prompt.
        """
        return pair if isinstance(pair, TokenizedPair) else self._tokenize(pair)

    def prompt_ids(self, prompt: Text, place: str = "") -> tuple[int, ...]:
        """Token ids of a prompt as generation would start from it."""
        if self._tokenizer is None:
            raise DataError(
                f"{place}: the row is text but the model has no tokenizer; give prompt_ids, chosen_ids, rejected_ids."
            )
        if self._has_template:
            return self._render(_as_messages(prompt, "user"), place, add_generation_prompt=True)
        ids = self._encode(prompt, place, add_special_tokens=True)
        # Some tokenizers close every text with EOS; a prompt is not closed yet.
        while len(ids) > 1 and ids[-1] in self._eos:
            ids = ids[:-1]
        return ids

    def _tokenize(self, pair: Pair) -> TokenizedPair:
        prompt_ids = self.prompt_ids(pair.prompt, pair.place)
        if not prompt_ids:
            raise DataError(
                f"{pair.place}: the prompt has no tokens, so the first completion token has nothing to follow."
            )
        chosen_ids, rejected_ids = (self._completion(pair, text, prompt_ids) for text in (pair.chosen, pair.rejected))
        return TokenizedPair(prompt_ids, chosen_ids, rejected_ids, pair.place)

    def _completion(self, pair: Pair, text: Text, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        if not self._has_template:
            return self._closed(self._encode(text, pair.place, add_special_tokens=False))
        messages = (*_as_messages(pair.prompt, "user"), *_as_messages(text, "assistant"))
        full = self._render(messages, pair.place, add_generation_prompt=False)
        if full[: len(prompt_ids)] != prompt_ids:
            raise DataError(
                f"{pair.place}: the chat template renders the prompt differently once the answer follows, so the "
                "boundary between them is unknown; use a template that does not rewrite earlier turns, or token ids."
            )
        return self._closed(full[len(prompt_ids) :])

    def _closed(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """`ids` ending in EOS: as rendered (white space may follow it), or with EOS appended."""
        tail = next((back for back, token in enumerate(reversed(ids)) if token in self._eos), None)
        if tail is not None and not self._decode(ids[len(ids) - tail :]).strip():
            return ids
        eos = self._tokenizer.eos_token_id if self._tokenizer is not None else None
        return ids if eos is None else (*ids, eos)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids))) if self._tokenizer is not None and ids else ""

    def _encode(self, text: Text, place: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        assert self._tokenizer is not None
        if not isinstance(text, str):
            raise DataError(
                f"{place}: the row is a conversation but the tokenizer has no chat template; give plain strings."
            )
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _render(self, messages: Iterable[Message], place: str, *, add_generation_prompt: bool) -> tuple[int, ...]:
        assert self._tokenizer is not None
        turns = [dict(message) for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=True)
        except Exception as error:  # Templates raise whatever they like, jinja2's errors among others.
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            raise DataError(f"{place}: the chat template refused the turns ({roles}): {_first_line(error)}.") from error
        return tuple(ids)


def tokenize_pairs(
    pairs: Iterable[Pair | TokenizedPair],
    tokenizer: Any | None,
    *,
    max_seq_length: int,
    limit: str = "--max-seq-length",
) -> tuple[list[TokenizedPair], Counter[str]]:
    """Tokenize every pair; returns those fit to train on, and how many were left out for which reason.

    Nothing is cut: a pair with a side longer than `max_seq_length` tokens (prompt + completion) is left out whole,
    since a cut completion is another completion, and so is a pair whose two sides are the same tokens. `limit` names
    where the length comes from.

    Raises:
        DataError: see `PairTokenizer.__call__`.
    """
    to_ids = PairTokenizer(tokenizer)
    kept: list[TokenizedPair] = []
    dropped: Counter[str] = Counter()
    for pair in map(to_ids, pairs):
        longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if longest > max_seq_length:
            dropped[f"longer than {limit} {max_seq_length}"] += 1
        elif pair.chosen_ids == pair.rejected_ids:
            dropped["chosen and rejected are the same tokens"] += 1
        else:
            kept.append(pair)
    return kept, dropped


def _as_messages(text: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

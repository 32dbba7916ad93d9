"""Where an answer ends: the tokens a checkpoint names as its end, and the one its chat template closes a turn with.

They differ in base models, whose end is that of a text, and in early conversions of Llama 3, Gemma 2 and Phi 3. Replies
that do not stop at the end of a turn run on into turns that the model makes up.
"""

from __future__ import annotations

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from orpo_mlx.data.tokens.bounded_templates import bound_templates, bounded_time
from orpo_mlx.text import printable

# A question and an answer that no template has words of its own for.
_QUESTION = "Q7"
_ANSWER = "xA7x"


def with_turn_end(tokenizer: TokenizerWrapper) -> str | None:
    """Add the token that the chat template closes an answer with to those that end a reply; a note where it was none.

    Args:
        tokenizer: mlx-lm's; its `eos_token_ids` are changed.
    """
    token = closing_token(tokenizer)
    known = set(tokenizer.eos_token_ids)
    if token is None or token in known:
        return None
    tokenizer.eos_token_ids = {*known, token}
    named = ", ".join(printable(tokenizer.decode([each])) for each in sorted(known)) or "none"
    closes = printable(tokenizer.decode([token]))
    return (
        f"This checkpoint names {named} as its end, and its chat template closes a turn with {closes}, as base models "
        f"and early conversions do: answers are trained to end, and replies stop, at {closes} as well."
    )


def closing_token(tokenizer: TokenizerWrapper) -> int | None:
    """The special token right behind an answer, as the chat template writes it; None where none can be told."""
    if not tokenizer.has_chat_template:
        return None
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    bound_templates()
    try:
        with bounded_time():
            text: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except Exception:  # Templates raise whatever they like; what is wrong with one is said when a row is rendered.
        return None
    after = str(text).rpartition(_ANSWER)[2].lstrip()
    added = tokenizer.added_tokens_decoder
    found = [index for index, token in added.items() if after.startswith(token.content) and token.content.strip()]
    # The longest: <|end|> and <|end|>x may both be tokens.
    return max(found, key=lambda index: len(added[index].content), default=None)

"""A local model as a judge."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from orpo_mlx.data.tokens.chat_template import PairRenderer
from orpo_mlx.errors import DataError, ModelError, reason_of
from orpo_mlx.judging.judges.verdicts import (
    FIRST,
    SECOND,
    THOUGHT,
    TIE,
    Question,
    Verdict,
    judge_parts,
    read_verdict,
)
from orpo_mlx.judging.requests import Sampling
from orpo_mlx.process_memory import clear_cache_above
from orpo_mlx.types import Pair

if TYPE_CHECKING:
    from orpo_mlx.models.loading import LoadedModel

TOKENS = 16
"""Of a verdict; judges that think aloud need more."""
# Judges' prompts are long, and all of them are in memory at once.
_ROWS = 16
_UNKNOWN_CONTEXT = 1 << 20
# Within which `<think>` and a line's end fit.
_OPENING_TOKENS = 16


CHOICE = "choice:"


class ModelJudge:
    """Asks an mlx-lm model, greedily, which of two replies is better.

    Args:
        name: Hub id, folder or `.gguf` file.
        max_tokens: of a verdict.
        dtype: a key of `DTYPES`; None for the checkpoint's.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
    """

    fair = False

    def __init__(
        self, name: str, *, max_tokens: int = TOKENS, dtype: str | None = None, trust_remote_code: bool = False
    ) -> None:
        self.name = name
        self._path = name.removeprefix(CHOICE)
        self._max_tokens = max_tokens
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._loaded: LoadedModel | None = None

    @property
    def identity(self) -> str:
        """See `Judge`."""
        return f"{self.name}, {self._max_tokens} tokens, {self._dtype}"

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        """See `Judge`; ModelError where the model cannot be used, DataError where it lacks ids of its tokenizer's."""
        # Here and not above: a command names a judge before it waits for mlx-lm.
        from orpo_mlx.judging.generation import Generator

        loaded = self._load()
        tokenizer: Any = loaded.tokenizer
        generator = Generator(loaded.model, tokenizer, Sampling(self._max_tokens), rows=_ROWS)
        asked = self._asked(loaded, questions, self._max_tokens)
        verdicts = [Verdict(None, "prompt_too_long")] * len(questions)
        said = generator.replies(list(asked.values()), progress)
        for number, (reply,) in zip(asked, said, strict=True):
            # Some templates open the thought themselves.
            opened = tokenizer.decode(asked[number][-_OPENING_TOKENS:]).rstrip().endswith(THOUGHT)
            verdicts[number] = read_verdict(THOUGHT + reply.text if opened else reply.text)
        clear_cache_above(0)
        return verdicts

    def find(self) -> None:
        """See `Loaded`."""
        from orpo_mlx.models.loading import find

        find(self._path, trust_remote_code=self._trust_remote_code, source="`judge`")

    def _asked(self, loaded: LoadedModel, questions: Sequence[Question], room: int) -> dict[int, list[int]]:
        """The prompt of each question, by number, that leaves room for so many tokens behind it."""
        from orpo_mlx.models.vocabulary import check_ids, vocabulary_of

        prompts = [judge_ids(loaded.tokenizer, question) for question in questions]
        vocabulary = vocabulary_of(loaded.model)
        for prompt in prompts:
            check_ids(vocabulary, prompt, f"a prompt of `judge={self.name}`")
        longest = context_of(loaded) - room
        return {number: prompt for number, prompt in enumerate(prompts) if len(prompt) <= longest}

    def _load(self) -> LoadedModel:
        # Only now: until the replies are there, the memory is theirs.
        if self._loaded is None:
            from orpo_mlx.models.loading import load

            self._loaded = load(self._path, dtype=self._dtype, trust_remote_code=self._trust_remote_code)
        if self._loaded.tokenizer is None:
            raise ModelError(f"`judge={self.name}`: has no tokenizer, so it cannot judge texts; give a model with one.")
        return self._loaded


class ChoiceJudge(ModelJudge):
    """Reads a model's verdict off the probabilities of its next token: is `[[` followed by A or by B?

    For models that are too small to keep to a form. Every question has a verdict; a tie is one order against the other.
    See `ModelJudge` for the arguments; `name` has `choice:` before the model.
    """

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        """See `ModelJudge`; ModelError where the model's tokenizer does not part the two."""
        import mlx.core as mx

        from orpo_mlx.models.adapters import in_evaluation

        loaded = self._load()
        opening, first, second = self._choices(loaded)
        asked = self._asked(loaded, questions, len(opening))
        verdicts = [Verdict(None, "prompt_too_long")] * len(questions)
        with in_evaluation(loaded.model):
            for done, (number, prompt) in enumerate(asked.items(), 1):
                logits = loaded.model(mx.array([[*prompt, *opening]]))[0, -1].astype(mx.float32)
                better = (logits[second] - logits[first]).item()
                verdicts[number] = Verdict(SECOND if better > 0 else FIRST if better < 0 else TIE)
                progress(done)
        clear_cache_above(0)
        return verdicts

    def _choices(self, loaded: LoadedModel) -> tuple[list[int], int, int]:
        """What both verdicts begin with, and the first token in which each differs from the other."""
        first, second = (encoded(loaded.tokenizer, f"[[{mark}]]", special=False) for mark in "AB")
        same = next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if same is None:
            raise ModelError(f"`judge={self.name}`: its tokenizer does not tell [[A]] from [[B]]; give another model.")
        return first[:same], first[same], second[same]


def context_of(loaded: LoadedModel) -> int:
    """The most tokens that a model runs exactly."""
    if loaded.exact_tokens is not None:
        return loaded.exact_tokens
    config = {**loaded.config, **(loaded.config.get("text_config") or {})}
    longest = config.get("max_position_embeddings")
    return longest if isinstance(longest, int) and longest > 0 else _UNKNOWN_CONTEXT


def judge_ids(tokenizer: Any, question: Question) -> list[int]:
    """A judge's prompt as token ids. In the texts to be judged, no special token is read as one: a reply that spells
    the end of a turn stays a reply."""
    parts = judge_parts(question)
    # What the template makes of the turn is told from the texts by marks that no text can foresee.
    mark = secrets.token_hex(16)
    turn = "".join(f"{mark}{number}{mark}" if judged else text for number, (text, judged) in enumerate(parts))
    rendered = rendered_turn(tokenizer, turn)
    # A chat template writes BOS itself; raw text gets the one that `encoded` does not add.
    ids = [] if tokenizer.has_chat_template or tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    for number, piece in enumerate(rendered.split(mark)):
        # Between two marks stands the number of a part.
        judged = number % 2 == 1
        ids += encoded(tokenizer, parts[int(piece)][0] if judged else piece, special=not judged)
    return ids


def rendered_turn(tokenizer: Any, content: str) -> str:
    """A user's turn as the model is asked it; ModelError where the chat template refuses it."""
    try:
        return PairRenderer(tokenizer, ()).prompt(Pair(content, "", "", "a question to the judge"))
    except DataError as error:
        raise ModelError(f"the judge's chat template refused a user's turn: {reason_of(error)}.") from None


def encoded(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text; `special`: whether special tokens in it are read as such."""
    if not text:
        return []
    try:
        # Not verbose: transformers would warn of a length that `ModelJudge` checks by itself.
        ids = tokenizer._tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)[
            "input_ids"
        ]
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"the judge's tokenizer refused a text: {reason_of(error)}.") from None
    return [int(token) for token in ids]

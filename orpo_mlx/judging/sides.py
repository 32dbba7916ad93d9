"""The replies of two models to the same prompts, from one set of weights where both share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from orpo_mlx.data.prompts import Prompt, spread
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.errors import DataError, ModelError
from orpo_mlx.judging.divergence import Divergence, sampled_kl
from orpo_mlx.judging.generation import Generated, Generator
from orpo_mlx.judging.requests import ROWS, Loading, Sampling, Side
from orpo_mlx.models.adapters import adapters_off, add_trained_adapters, has_switchable_adapters
from orpo_mlx.models.loading import LoadedModel, ModelInfo, load
from orpo_mlx.models.vocabulary import check_ids, vocabulary_of

KL_REPLIES = 10
"""Replies that the KL to the base is estimated on."""


class Replies(NamedTuple):
    """What both sides said, in the order of the prompts."""

    baseline: list[Generated]
    candidate: list[Generated]
    divergence: Divergence | None
    """KL(candidate ‖ baseline); None unless the candidate is the baseline with adapters that can be switched off."""
    notes: list[str]
    """What a user should know of the models."""


Progress = Callable[[int], None]
"""Called with the number of replies so far, of both sides."""


def replies_of_both(
    baseline: Side,
    candidate: Side,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    loading: Loading | None = None,
    rows: int = ROWS,
    progress: Progress = lambda done: None,
    known: list[Generated] | None = None,
) -> Replies:
    """One reply of each side to every prompt; of the baseline what is `known` of it, where that is given.

    Where the candidate is the baseline with LoRA or DoRA adapters, both are one model, with the adapters off and on.
    Otherwise the sides are loaded one after the other, never both at once.

    Raises:
        UserError: a model or adapters cannot be used, or a prompt cannot be given to it.
    """
    loading = loading or Loading()
    loaded = load_side(candidate, loading)
    shared = baseline == Side(candidate.model) and has_switchable_adapters(loaded.model)
    if shared:
        first = known or draw(loaded, prompts, sampling, rows, progress, partial(adapters_off, loaded.model))
        second = draw(loaded, prompts, sampling, rows, lambda done: progress(len(prompts) + done))
        divergence = kl_to_base(loaded, prompts, sampling)
        return Replies(first, second, divergence, notes_of([loaded]))
    second = draw(loaded, prompts, sampling, rows, progress)
    notes = notes_of([loaded])
    if known is not None:
        return Replies(known, second, None, notes)
    # Two models need not fit side by side.
    del loaded
    loaded = load_side(baseline, loading)
    first = draw(loaded, prompts, sampling, rows, lambda done: progress(len(prompts) + done))
    return Replies(first, second, None, [*dict.fromkeys([*notes, *notes_of([loaded])])])


def load_side(side: Side, loading: Loading) -> LoadedModel:
    """A side's model with its adapters on; ModelError where it has no tokenizer."""
    loaded = load(side.model, dtype=loading.dtype, trust_remote_code=loading.trust_remote_code)
    require_tokenizer(loaded)
    if side.adapter is not None:
        add_trained_adapters(loaded.model, side.adapter)
    return loaded


def require_tokenizer(model: LoadedModel | ModelInfo) -> None:
    """Raise ModelError where a model has no tokenizer."""
    if model.tokenizer is None:
        raise ModelError(f"{model.path}: has no tokenizer, so its replies cannot be read; give a model that has one.")


def draw(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    rows: int = ROWS,
    progress: Progress = lambda done: None,
    state: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Generated]:
    """One reply of a model to every prompt, given in a `state` such as the one with the adapters off."""
    ids = prompt_ids(loaded, prompts, sampling)
    with state():
        generator = Generator(loaded.model, loaded.tokenizer, sampling, rows=rows)
        return [reply for (reply,) in generator.replies(ids, progress)]


def prompt_ids(loaded: LoadedModel, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
    """Token ids of each prompt.

    Raises:
        DataError: see `rendered`, or a prompt has ids that are not the model's.
    """
    found = rendered(loaded, prompts, sampling)
    vocabulary = vocabulary_of(loaded.model)
    for ids, prompt in zip(found, prompts, strict=True):
        check_ids(vocabulary, ids, prompt.location)
    return found


def rendered(loaded: LoadedModel | ModelInfo, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
    """Token ids of each prompt, as far as they need no weights.

    Raises:
        DataError: a prompt cannot be rendered, or is longer than what mlx-lm runs exactly.
    """
    tokenizer = PairTokenizer(loaded.tokenizer, template_strings=sampling.template_strings)
    found = [tokenizer.prompt_ids(prompt.pair) for prompt in prompts]
    for ids, prompt in zip(found, prompts, strict=True):
        if loaded.exact_tokens is not None and len(ids) + sampling.max_tokens > loaded.exact_tokens:
            raise DataError(
                f"{prompt.location}: {len(ids)} tokens and {sampling.max_tokens} of a reply, but this model attends "
                f"within a window of {loaded.exact_tokens} which mlx-lm does not apply; leave out or shorten the row."
            )
        if not ids:
            raise DataError(f"{prompt.location}: the prompt has no tokens.")
    return found


def kl_to_base(loaded: LoadedModel, prompts: Sequence[Prompt], sampling: Sampling) -> Divergence:
    """KL(with adapters ‖ without) on replies drawn at temperature 1 to some of the prompts."""
    ids = prompt_ids(loaded, spread(list(prompts), KL_REPLIES), sampling)
    stop = loaded.tokenizer.eos_token_ids if loaded.tokenizer is not None else ()
    return sampled_kl(loaded.model, ids, set(stop), seed=sampling.seed, max_tokens=sampling.max_tokens)


def notes_of(models: Sequence[LoadedModel]) -> list[str]:
    """The notes of some models."""
    return [loaded.note for loaded in models if loaded.note]

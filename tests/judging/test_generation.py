"""Replies in batches against mlx-lm's own generation, one prompt at a time."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_tokenizer

from orpo_mlx.judging.generation import Generator, common_start, little_padding
from orpo_mlx.judging.requests import Sampling
from tests.conftest import CONFIGS, make_model

LENGTHS = (1, 5, 17, 9, 3)
MOST = 10


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[int(token) for token in rng.integers(3, 250, length)] for length in LENGTHS]


def by_mlx_lm(model: nn.Module, prompt: list[int], stop: set[int]) -> tuple[int, ...]:
    reply = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=MOST):
        if int(token) in stop:
            break
        reply.append(int(token))
    return tuple(reply)


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_replies_are_those_of_one_prompt_at_a_time(kind: str, model_folder: Path) -> None:
    model = make_model(kind)
    tokenizer = load_tokenizer(model_folder)
    expected = [by_mlx_lm(model, prompt, set(tokenizer.eos_token_ids)) for prompt in prompts()]
    for samples in (1, 3):
        generator = Generator(model, tokenizer, Sampling(MOST), samples=samples, rows=9)
        found = [[reply.ids for reply in replies] for replies in generator.replies(prompts())]
        assert found == [[reply] * samples for reply in expected]
        # mlx-lm's batch generator fails on Gemma 2; every other kind runs in batches.
        assert generator.batches == (kind != "gemma2")


@pytest.mark.parametrize("kind", CONFIGS)
def test_prompts_that_begin_alike_are_run_together_with_the_same_replies(kind: str, model_folder: Path) -> None:
    model = make_model(kind)
    tokenizer = load_tokenizer(model_folder)
    asked = [[7, 9, 11, *prompt] for prompt in ([5, 3, 8, 4, 9], [5, 3, 9, 200], [6, 77, 8, 4, 9])]
    asked.append([7, 9, 11, *range(20, 24)])
    assert (common_start(asked), little_padding(asked)) == (3, True)
    expected = [by_mlx_lm(model, prompt, set(tokenizer.eos_token_ids)) for prompt in asked]
    generator = Generator(model, tokenizer, Sampling(MOST))
    assert [reply.ids for (reply,) in generator.replies(asked)] == expected
    # A state space model would read padding as tokens.
    assert generator._pads == (kind not in ("gemma2", "mamba"))


@pytest.mark.parametrize(
    ("asked", "start", "little"),
    [
        ([[1, 2, 3]], 2, True),
        ([[1, 2], [1, 2]], 1, True),
        ([[1], [1, 2, 3, 4, 5, 6]], 0, False),
        ([[1, 2, 3, 4], [2, 2, 3]], 0, True),
        ([[1, 2, 3, *[4] * 9], [1, 2, 3, 4]], 3, False),
    ],
)
def test_what_prompts_begin_with_alike_leaves_each_a_token(asked: list[list[int]], start: int, little: bool) -> None:
    assert (common_start(asked), little_padding(asked)) == (start, little)


def test_a_group_is_the_same_whenever_it_is_drawn_and_seeds_differ(model_folder: Path) -> None:
    model, tokenizer = make_model(), load_tokenizer(model_folder)

    def drawn(seed: int, first: int = 0) -> list[list[tuple[int, ...]]]:
        generator = Generator(model, tokenizer, Sampling(MOST, 1.0, seed=seed), samples=4, rows=8)
        assert generator.group_size == 2
        return [[reply.ids for reply in replies] for group in generator.groups(prompts(), first) for replies in group]

    whole = drawn(0)
    mx.random.normal((3,))
    assert drawn(0, first=1) == whole[2:]
    assert drawn(1) != whole
    assert all(len(set(replies)) > 1 for replies in whole)


def test_samples_are_drawn_from_the_models_distribution(model_folder: Path) -> None:
    model, tokenizer = make_model(), load_tokenizer(model_folder)
    prompt = prompts()[1]
    generator = Generator(model, tokenizer, Sampling(1, 1.0), samples=4000, rows=4000)
    (replies,) = generator.replies([prompt])
    drawn = np.bincount([reply.ids[0] for reply in replies if reply.ids], minlength=259) / len(replies)
    expected = np.array(mx.softmax(model(mx.array([prompt]))[0, -1]))
    expected[list(tokenizer.eos_token_ids)] = 0
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(expected.max() / len(replies))
    assert not any(reply.finished for reply in replies if reply.ids)


def test_a_model_whose_batches_are_wrong_is_asked_one_at_a_time(model_folder: Path) -> None:
    class Padded(nn.Module):
        """Sees how many rows there are, as a model that forgets its mask sees padding."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()
            self.args = self.inner.args

        @property
        def layers(self) -> object:
            return self.inner.layers

        def __call__(self, ids: mx.array, cache: object = None) -> mx.array:
            logits: mx.array = self.inner(ids, cache=cache)
            return logits if ids.shape[0] == 1 else logits[..., ::-1]

    tokenizer = load_tokenizer(model_folder)
    generator = Generator(Padded(), tokenizer, Sampling(MOST))
    assert not generator.batches
    expected = Generator(make_model(), tokenizer, Sampling(MOST))
    assert generator.replies(prompts()) == expected.replies(prompts())

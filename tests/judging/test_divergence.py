"""KL to the base against sums in float64, and exactly where there is nothing to sample."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest

from orpo_mlx.judging.divergence import distinct_n, sampled_kl, sequence_kl
from orpo_mlx.judging.generation import Generator, StopTokens
from orpo_mlx.judging.requests import Sampling
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from tests.conftest import make_model

PROMPT, REPLY = (5, 9, 2, 7), (3, 8, 1)


def trained(seed: int = 1, size: float = 0.05) -> nn.Module:
    model = make_model()
    add_adapters(model, "lora", -1, {"rank": 2, "dropout": 0.5, "scale": 20.0})
    mx.random.seed(seed)
    moved = [(name, value + size * mx.random.normal(value.shape)) for name, value in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    mx.eval(model.parameters())
    model.train()
    return model


def log_softmax(logits: mx.array) -> npt.NDArray[np.float64]:
    values = np.array(logits, np.float64)
    shifted = values - values.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def expected(reply: tuple[int, ...]) -> float:
    model, base = trained(), make_model()
    model.eval()
    ids = mx.array([[*PROMPT, *reply]])
    policy, reference = (log_softmax(each(ids)[0])[len(PROMPT) - 1 : -1] for each in (model, base))
    assert len(policy) == len(reply)
    return float((np.exp(policy) * (policy - reference)).sum())


def test_a_given_reply() -> None:
    model = trained()
    model.eval()
    assert sequence_kl(model, PROMPT, REPLY).item() == pytest.approx(expected(REPLY), rel=1e-4)
    assert expected(REPLY) > 0.1


def test_log_probs_that_replies_were_drawn_from_are_those_of_a_second_run() -> None:
    model = trained()
    prompts = [PROMPT, PROMPT[:2], (*PROMPT, 4, 9)]
    generator = Generator(model, StopTokens(range(100)), Sampling(6, 1.0, seed=1), keep_logps=True)
    assert generator.batches
    drawn = generator.draw(prompts, 0)
    # Cut, and ended by a token that is no part of `ids`.
    assert {row.end is None for row in drawn} == {True, False}
    replies = [[*row.ids, *([] if row.end is None else [row.end])] for row in drawn]
    logps = [row.logps for row in drawn if row.logps is not None]
    assert [len(each) for each in logps] == [len(reply) for reply in replies]
    model.eval()

    def second_run(prompt: tuple[int, ...], reply: list[int]) -> npt.NDArray[np.float64]:
        return log_softmax(model(mx.array([[*prompt, *reply]]))[0, len(prompt) - 1 : -1])

    for prompt, reply, found in zip(prompts, replies, logps, strict=True):
        np.testing.assert_allclose(np.array(found), second_run(prompt, reply), atol=1e-4)
    # A model whose prompts are run singly keeps the same.
    generator.batches = False
    for prompt, row in zip(prompts, generator.draw(prompts, 0), strict=True):
        reply = [*row.ids, *([] if row.end is None else [row.end])]
        np.testing.assert_allclose(np.array(row.logps), second_run(prompt, reply), atol=1e-4)


def test_replies_of_one_token_need_no_sampling() -> None:
    found = sampled_kl(trained(), [PROMPT, PROMPT], (), seed=0, max_tokens=1)
    assert found.per_reply == pytest.approx(expected((0,)), rel=1e-4)
    assert (found.replies, found.tokens) == (2, 2)


def test_longer_replies_are_those_that_were_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(model: nn.Module, prompt: tuple[int, ...], reply: list[int]) -> mx.array:
        assert not model.training
        seen.append(tuple(reply))
        return sequence_kl(model, prompt, reply)

    monkeypatch.setattr("orpo_mlx.judging.divergence.sequence_kl", spy)
    found = sampled_kl(trained(), [PROMPT] * 6, range(130), seed=3, max_tokens=5)
    assert found.per_reply == pytest.approx(np.mean([expected(reply) for reply in seen]), rel=1e-4)
    assert found.tokens == sum(map(len, seen))
    # A stop token ends a reply and nothing follows it.
    assert any(len(reply) < 5 for reply in seen)
    assert all(token >= 130 for reply in seen for token in reply[:-1])
    again = sampled_kl(trained(), [PROMPT] * 6, range(130), seed=3, max_tokens=5)
    assert again == found


def test_fresh_adapters_have_not_moved() -> None:
    model = make_model()
    add_adapters(model, "lora", -1, {"rank": 2, "dropout": 0.0, "scale": 20.0})
    assert sampled_kl(model, [PROMPT], (), seed=0, max_tokens=4).per_reply == pytest.approx(0, abs=1e-6)


def test_distinct_n() -> None:
    # a b, b a, a b: two of three; across texts nothing is joined.
    assert distinct_n(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct_n(["a b", "a b"]) == 0.5
    assert distinct_n(["a b c"], 3) == 1
    assert distinct_n(["a", ""]) is None

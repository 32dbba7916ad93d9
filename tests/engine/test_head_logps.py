"""Log-probs from hidden states against a float64 oracle: values, gradients, in tiles and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from orpo_mlx.device_profile import CPU, GPU, DeviceProfile
from orpo_mlx.engine import head_logps as module
from orpo_mlx.engine.head_logps import kl_divergence, log_softmax, log_sum_exp, token_logps
from orpo_mlx.engine.lm_head import ModelHead, find_head
from orpo_mlx.models.adapters import add_adapters
from tests.conftest import VOCABULARY, make_model
from tests.helpers import float64_losses as oracle
from tests.helpers.least_peak import least_peak

head_logps = partial(module.head_logps, profile=CPU)
trained_head_logps = partial(module.trained_head_logps, profile=CPU)
# Chunks of the fewest rows.
SMALL_CHUNKS = CPU._replace(head_chunk_mib=0)


@pytest.mark.parametrize("vocabulary", [7, 128, 300, 49_152, 151_936])
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_token_logps_are_within_1e5_nats_of_float64(vocabulary: int, spread: float) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = (spread * rng.standard_normal((8, vocabulary))).astype(np.float32)
    targets = rng.integers(0, vocabulary, 8)
    found = np.array(token_logps(mx.array(logits), mx.array(targets)))
    np.testing.assert_allclose(found, oracle.token_logps(logits.astype(np.float64), targets), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [7, 300, 49_152, 151_936])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_kl_of_whole_distributions_is_float64s(vocabulary: int, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(vocabulary)
    drawn = 3 * rng.standard_normal((8, vocabulary))
    base = mx.array(drawn).astype(dtype)
    policy = mx.array(drawn + 0.3 * rng.standard_normal(drawn.shape)).astype(dtype)
    logps, others = (
        wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        for wide in (np.array(logits.astype(mx.float32), np.float64) for logits in (policy, base))
    )
    found = log_softmax(policy)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), logps, rtol=0, atol=1e-5)
    exact = (np.exp(logps) * (logps - others)).sum(-1)
    # Terms of either sign that cancel; MLX's own softmax and sum on a CPU are 7e-4 off here.
    np.testing.assert_allclose(np.array(kl_divergence(found, log_softmax(base))), exact, rtol=1e-4, atol=1e-6)


def test_one_float32_sum_would_not_be_within_1e5() -> None:
    # The reason for two levels: this fails the day MLX's own sum no longer drifts, and the blocks can then go.
    logits = np.random.default_rng(0).standard_normal((8, 151_936)).astype(np.float32)
    exact = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    # On a CPU: a GPU adds in a tree.
    with mx.stream(mx.Device(mx.cpu)):
        assert np.abs(np.array(mx.logsumexp(mx.array(logits), axis=-1)) - exact).max() > 1e-5
    peak, rest = log_sum_exp(mx.array(logits))
    assert np.abs(np.array(peak + rest) - exact).max() < 1e-5


def test_logits_of_any_size_stay_finite() -> None:
    logits = mx.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    np.testing.assert_allclose(np.array(token_logps(logits, mx.array([1, 0]))), [-2e4, -np.log(3)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_reduced_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.array(np.random.default_rng(0).standard_normal((4, 5000))).astype(dtype)
    targets = mx.array([1, 2, 3, 4])
    found = token_logps(logits, targets)
    exact = oracle.token_logps(np.array(logits.astype(mx.float32), np.float64), np.array(targets))
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), exact, rtol=0, atol=1e-5)


def test_token_logps_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) do not fit logits of shape \(2, 5\)"):
        token_logps(mx.zeros((2, 5)), mx.array([0, 1, 2]))


class Embeds(nn.Module):
    """A model that is nothing but its embedding, tied to a head with or without a bias."""

    def __init__(self, vocabulary: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, width)
        self.model.layers = []
        self.lm_head = nn.Linear(width, vocabulary, bias=bias)

    def __call__(self, ids: mx.array) -> mx.array:
        logits: mx.array = self.lm_head(self.model(ids))
        return logits


def made_head(vocabulary: int, *, bias: bool, tiles: bool) -> ModelHead:
    model = Embeds(vocabulary, 16, bias=bias)
    model.lm_head.weight = mx.random.normal((vocabulary, 16))
    if bias:
        model.lm_head.bias = mx.random.normal((vocabulary,))
    model.freeze()
    return ModelHead(model, "model", vocabulary, tiles=tiles)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("profile", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 64), (3, 7), (64, 300), (64, 299)])
def test_head_in_tiles_has_the_value_and_gradient_of_the_whole(
    rows: int, tokens: int, tiles: bool, bias: bool, profile: DeviceProfile
) -> None:
    profile = profile._replace(head_tile_rows=rows, head_tile_tokens=tokens)
    rng = np.random.default_rng(1)
    head = made_head(300, bias=bias, tiles=tiles)
    weight = np.array(head.model.lm_head.weight, np.float64)
    shift = np.array(head.model.lm_head.bias, np.float64) if bias else 0.0
    # The first token's target is the last of the vocabulary, the second's the first.
    hidden, targets = rng.standard_normal((10, 16)), np.array([299, 0, *rng.integers(0, 300, 8)])
    cotangent = rng.standard_normal(10)

    def weighted(states: mx.array) -> mx.array:
        logps = head_logps(head, states, mx.array(targets), profile=profile)
        return (logps * mx.array(cotangent.astype(np.float32))).sum()

    value, grad = mx.value_and_grad(weighted)(mx.array(hidden.astype(np.float32)))
    logits = hidden @ weight.T + shift
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    expected = cotangent[:, None] * (weight[targets] - probs @ weight)
    np.testing.assert_allclose(float(value), (oracle.token_logps(logits, targets) * cotangent).sum(), rtol=1e-5)
    np.testing.assert_allclose(np.array(grad), expected, rtol=1e-4, atol=1e-5)
    without = head_logps(head, mx.array(hidden.astype(np.float32)), mx.array(targets), profile=profile, gradient=False)
    np.testing.assert_allclose(np.array(without), oracle.token_logps(logits, targets), rtol=1e-5, atol=1e-5)


def test_logits_that_grow_from_tile_to_tile_stay_exact() -> None:
    head = made_head(40, bias=False, tiles=True)
    head.model.lm_head.weight = mx.arange(40, dtype=mx.float32)[:, None] * mx.ones((1, 16))
    profile = CPU._replace(head_tile_tokens=10)
    logps = head_logps(head, mx.ones((2, 16)), mx.array([39, 0]), profile=profile)
    np.testing.assert_allclose(np.array(logps), [0.0, -39.0 * 16], atol=1e-5)


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    peaks: list[int] = []
    for vocabulary in (20_000, 40_000):
        head = made_head(vocabulary, bias=False, tiles=True)
        hidden, targets = mx.random.normal((700, 16)), mx.zeros((700,), mx.int32)
        mx.eval(head.model.parameters(), hidden, targets)
        function = mx.value_and_grad(lambda x, head=head, targets=targets: head_logps(head, x, targets).sum())
        # All logits would take 56 and 112 MB; a tile more or less is what a CPU's stream allocates ahead.
        enough = min(40e6, peaks[0] + 0.2 * 56e6) if peaks else 0
        peaks.append(least_peak(partial(lambda compute, x: mx.eval(compute(x)), function, hidden), enough))
    assert max(peaks) < 40e6
    assert peaks[1] - peaks[0] < 0.2 * 56e6


def trained_head(kind: str, key: str, *, dropout: float = 0.0, vocabulary: int = VOCABULARY) -> ModelHead:
    model = make_model(kind, vocabulary=vocabulary)
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": dropout, "keys": ["self_attn.q_proj", key]})
    model.update(
        tree_unflatten([(name, mx.random.normal(array.shape)) for name, array in head_parameters(model).items()])
    )
    assert any(name.endswith("lora_b") for name in head_parameters(model))
    model.eval()
    head = find_head(model)
    assert head is not None
    assert not head.is_frozen
    return head


def head_parameters(model: nn.Module) -> dict[str, mx.array]:
    parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    return {name: array for name, array in parameters.items() if ".layers." not in name}


@pytest.mark.parametrize(
    ("kind", "key"), [("llama", "lm_head"), ("qwen2", "model.embed_tokens"), ("gemma2", "model.embed_tokens")]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trained_head_in_chunks_is_the_head_at_once(kind: str, key: str, dropout: float) -> None:
    head = trained_head(kind, key, dropout=dropout)
    rng = np.random.default_rng(0)
    hidden = mx.array(rng.standard_normal((40, 32)).astype(np.float32))
    targets = mx.array(rng.integers(0, VOCABULARY, 40))
    weights = mx.array(rng.standard_normal(40).astype(np.float32))
    names = list(head.trained)
    head.model.train()

    def value_and_grads(logps: Callable[[mx.array], mx.array]) -> tuple[mx.array, list[mx.array]]:
        before = list(head.trained.values())

        def loss(arrays: list[mx.array]) -> mx.array:
            mx.random.seed(3)
            head.update(dict(zip(names, arrays[1:], strict=True)))
            return (weights * logps(arrays[0])).sum()

        value, grads = mx.value_and_grad(loss)([hidden, *before])
        head.update(dict(zip(names, before, strict=True)))
        mx.eval(value, grads)
        return value, grads

    value, grads = value_and_grads(lambda x: trained_head_logps(head, x, targets, profile=SMALL_CHUNKS))
    if dropout:
        # Chunks draw their own masks: the same twice, and a gradient that is the value's own.
        again, _ = value_and_grads(lambda x: trained_head_logps(head, x, targets, profile=SMALL_CHUNKS))
        assert value.item() == again.item()
        direction = mx.array(rng.standard_normal(grads[-1].shape).astype(np.float32))
        start = head.trained[names[-1]]
        ends = []
        for step in (1e-3, -1e-3):
            head.update({names[-1]: start + step * direction})
            ends.append(value_and_grads(lambda x: trained_head_logps(head, x, targets, profile=SMALL_CHUNKS))[0].item())
        head.update({names[-1]: start})
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx((grads[-1] * direction).sum().item(), rel=5e-3, abs=2e-2)
        return
    expected_value, expected = value_and_grads(lambda x: token_logps(head(x), targets))
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    for name, found, wanted in zip(["hidden", *names], grads, expected, strict=True):
        scale = np.abs(np.array(wanted)).max()
        np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=0, atol=1e-4 * scale, err_msg=name)
        assert scale > 0


def test_a_trained_head_holds_the_logits_of_one_chunk() -> None:
    vocabulary, rows = 20_000, 1024
    head = trained_head("llama", "lm_head", vocabulary=vocabulary)
    all_logits = 4 * rows * vocabulary

    def peak(rows: int, enough: float, logps: Callable[[mx.array, mx.array], mx.array]) -> int:
        hidden, targets = mx.random.normal((rows, 32)), mx.zeros((rows,), mx.int32)
        mx.eval(hidden, head.model.parameters())
        names, values = list(head.trained), list(head.trained.values())

        def loss(arrays: list[mx.array]) -> mx.array:
            head.update(dict(zip(names, arrays[1:], strict=True)))
            return logps(arrays[0], targets).sum()

        def compute() -> None:
            mx.eval(mx.grad(loss)([hidden, *values]))
            head.update(dict(zip(names, values, strict=True)))

        return least_peak(compute, enough)

    # What it stands in for holds several times the logits, however many rows there are.
    assert peak(rows // 8, 0, lambda x, targets: token_logps(head(x), targets)) > 2 * all_logits / 8
    assert peak(rows, all_logits, partial(trained_head_logps, head)) < all_logits


@pytest.mark.skipif(not hasattr(mx.fast, "cross_entropy"), reason="this MLX has no such function")
@pytest.mark.parametrize("tiles", [False, True])
def test_mlx_own_cross_entropy_takes_logits_in_one_piece(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    own = mx.fast.cross_entropy

    def counted(logits: mx.array, targets: mx.array) -> mx.array:
        calls.append(logits.shape)
        return own(logits, targets)

    monkeypatch.setattr(mx.fast, "cross_entropy", counted)
    native = GPU._replace(native_cross_entropy=True)
    head = made_head(300, bias=True, tiles=tiles)
    hidden, targets = mx.random.normal((10, 16)), mx.arange(10)

    def value_and_grad(profile: DeviceProfile) -> list[mx.array]:
        value, grad = mx.value_and_grad(lambda x: module.head_logps(head, x, targets, profile=profile).sum())(hidden)
        return [value, grad]

    for one, other in zip(value_and_grad(native), value_and_grad(CPU), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-4)
    # A head in tiles never has its logits in one piece.
    assert bool(calls) != tiles


@pytest.mark.parametrize("profile", [CPU, SMALL_CHUNKS, GPU], ids=["cpu", "small", "gpu"])
@pytest.mark.parametrize("trained", [False, True])
def test_it_can_be_traced(trained: bool, profile: DeviceProfile) -> None:
    head = trained_head("llama", "lm_head") if trained else made_head(300, bias=True, tiles=True)
    hidden, targets = mx.random.normal((40, 32 if trained else 16)), mx.arange(40)
    function = module.trained_head_logps if trained else module.head_logps

    def gradient(hidden: mx.array, targets: mx.array) -> mx.array:
        result: mx.array = mx.grad(lambda x: function(head, x, targets, profile=profile).sum())(hidden)
        return result

    found = mx.compile(gradient)(hidden, targets)
    np.testing.assert_allclose(np.array(found), np.array(gradient(hidden, targets)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_random_numbers_are_drawn_where_there_is_dropout_alone(dropout: float) -> None:
    head = trained_head("llama", "lm_head", dropout=dropout)
    head.model.train()
    mx.random.seed(5)
    state: Any = mx.random.state
    before = np.array(state[0])
    hidden, targets = mx.random.normal((40, 32), key=mx.random.key(0)), mx.arange(40)
    mx.eval(mx.grad(lambda x: trained_head_logps(head, x, targets).sum())(hidden))
    assert (np.array(state[0]) == before).all() == (dropout == 0)

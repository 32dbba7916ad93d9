"""Short prompts and completions where MLX's kernel for few queries has no gradient, as on Metal with MLX 0.32.4."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

from orpo_mlx.device_profile import VARIABLE
from orpo_mlx.engine.memory_modes import Memory, spend_memory
from orpo_mlx.engine.modes import MODES
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.engine.segmented_backward import whole_value_and_grad
from orpo_mlx.models.adapters import add_adapters
from orpo_mlx.types import Batch, TokenizedPair
from tests.helpers.metal_attention import raise_as_metal_does

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "vocab_size": 90,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}
LENGTHS = range(1, 10)
PAIRS = [
    TokenizedPair(tuple(range(1, prompt + 1)), tuple(range(20, 20 + chosen)), tuple(range(40, 50 - chosen)))
    for prompt in LENGTHS
    for chosen in LENGTHS
]


def adapted_model() -> nn.Module:
    Model: Any = llama.Model  # noqa: N806
    mx.random.seed(0)
    model: nn.Module = Model(llama.ModelArgs.from_dict(CONFIG))
    model.freeze()
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    mx.eval(model.parameters())
    return model


def loss_and_gradients(scorer: PairScorer, memory: Memory | None, pairs: list[TokenizedPair]) -> list[mx.array]:
    def share(states: mx.array, batch: Batch, _: Any) -> tuple[mx.array, mx.array]:
        logps = pair_logps(scorer, batch, states=states)
        return (logps.chosen * mx.arange(1, len(pairs) + 1) - logps.rejected).sum(), logps.chosen

    batch = scorer.collate(pairs)
    (loss, _), gradients = (
        whole_value_and_grad(scorer, batch, (), share) if memory is None else memory.value_and_grad(batch, (), share)
    )
    return [loss, *(gradients[name] for name in sorted(gradients))]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_on_them(mode: str, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model()
    # One pair at a time, and all of a prompt's together.
    batches = [PAIRS[::17], *([pair] for pair in PAIRS[::20])]
    plain = PairScorer(model, share_prompt=False, split_head=False, lean=False)
    expected = [loss_and_gradients(plain, None, pairs) for pairs in batches]
    mx.eval(expected)
    raise_as_metal_does(monkeypatch)
    monkeypatch.setenv(VARIABLE, profile)
    scorer, memory = spend_memory(model, mode, share_prompt=True, split_head=True, segment_layers=1)
    assert memory.notes == ()
    for pairs, wanted in zip(batches, expected, strict=True):
        for one, other in zip(loss_and_gradients(scorer, memory, pairs), wanted, strict=True):
            largest = float(np.abs(np.array(other)).max())
            np.testing.assert_allclose(np.array(one), np.array(other), rtol=0, atol=1e-4 * largest)

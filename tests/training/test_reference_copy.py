"""A second copy of the weights: the same numbers as the shared ones, and its own bytes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.config.checks import make_config
from orpo_mlx.data.batching import collate
from orpo_mlx.errors import ConfigError
from orpo_mlx.memory.choose_mode import change_memory
from orpo_mlx.models.adapters import add_adapters
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.references.other_references import copy_of
from orpo_mlx.training.steps.step import optimiser_step
from tests.conftest import make_model, make_pairs, quantise

LORA = {"rank": 4, "dropout": 0.0, "scale": 20.0}


@pytest.mark.parametrize("bits", [32, 4])
def test_the_copy_has_buffers_of_its_own(bits: int) -> None:
    model = make_model(vocabulary=4096)
    if bits == 4:
        quantise(model)
        mx.eval(model.parameters())
    size = sum(array.nbytes for _, array in _flat(model))
    add_adapters(model, "lora", -1, LORA)
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    twin = copy_of(model, base=True)
    assert mx.get_active_memory() - before >= 0.95 * size
    assert not any("lora" in name for name, _ in _flat(twin))
    assert not tree_flatten(twin.trainable_parameters())


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_it_stays_what_the_policy_was(settings: dict[str, Any], fine_tune_type: str) -> None:
    runs = {}
    for kind in ("start", "copy"):
        values = {**settings, "method": "dpo", "reference": kind, "fine_tune_type": fine_tune_type}
        runs[kind] = prepare(make_config({**values, "learning_rate": 1e-2}))
    pairs = make_pairs(6)
    shared, copied = runs["start"], runs["copy"]
    assert shared.reference is not None
    assert copied.reference is not None
    shared.reference.remember([pairs])
    losses = {
        kind: [optimiser_step(run, pairs, step).means()["loss"] for step in (1, 2, 3)] for kind, run in runs.items()
    }
    np.testing.assert_allclose(losses["copy"], losses["start"], rtol=1e-5)
    assert losses["copy"][2] < losses["copy"][0]
    change_memory(copied, "thrift")
    batch = collate(pairs)
    expected = shared.reference(pairs, batch)
    for side, other in zip(copied.reference(pairs, batch)[:2], expected[:2], strict=True):
        np.testing.assert_allclose(np.array(side), np.array(other), rtol=1e-5)
    assert len(copied.reference.table) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "orpo", "reference": "copy"}, "method orpo compares with no reference"),
        ({"method": "dpo", "reference": "copy", "precompute_reference": True}, "leave out `precompute_reference`"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_config(values)


def _flat(model: Any) -> list[tuple[str, mx.array]]:
    return list(dict(tree_flatten(model.parameters())).items())

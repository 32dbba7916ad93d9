"""A model's head told apart from its body, whatever kind of head it has."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.engine.lm_head import find_head
from tests.conftest import PROVABLE, VOCABULARY, make_model, quantise


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", PROVABLE)
def test_the_models_own_head_is_found_whole_and_in_tiles(kind: str, quantised: bool) -> None:
    model = make_model(kind)
    if quantised:
        quantise(model)
    ids = mx.array([[5, 6, 7, 8]])
    head = find_head(model)
    assert head is not None
    assert head.tiles
    owner: Any = model.get("language_model", model)
    hidden, logits = owner["model"](ids), np.array(model(ids))
    np.testing.assert_allclose(np.array(head(hidden)), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.array(head(hidden, slice(3, 50))), logits[..., 3:50], rtol=1e-4, atol=1e-4)
    rows = [9, 0, VOCABULARY - 1]
    np.testing.assert_allclose(np.array(head(hidden, mx.array(rows))), logits[..., rows], rtol=1e-4, atol=1e-4)

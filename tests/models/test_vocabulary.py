"""Token ids past the embedding never reach a model, whatever its class."""

from __future__ import annotations

import pytest
from mlx_lm.models import gpt2

from orpo_mlx.errors import DataError
from orpo_mlx.models.vocabulary import check_ids, vocabulary_of
from tests.conftest import CONFIGS, VOCABULARY, make_model, quantise


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_model_says_how_many_ids_it_has(kind: str) -> None:
    assert vocabulary_of(make_model(kind)) == VOCABULARY


def test_positions_are_no_tokens() -> None:
    small = {"n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 16, "num_key_value_heads": 2}
    args = gpt2.ModelArgs(model_type="gpt2", layer_norm_epsilon=1e-5, vocab_size=50, **small)
    assert vocabulary_of(gpt2.Model(args)) == 50


def test_a_quantised_embedding_has_as_many_ids() -> None:
    model = make_model("llama")
    quantise(model)
    assert vocabulary_of(model) == VOCABULARY


@pytest.mark.parametrize("token", [VOCABULARY, 9_000_000, 2**40, -1])
def test_what_is_out_of_range_is_named_with_its_place(token: int) -> None:
    with pytest.raises(DataError, match=f"pairs.jsonl:3: token id {token} is outside the model's vocabulary of"):
        check_ids(VOCABULARY, [5, token, 7], "pairs.jsonl:3")
    check_ids(VOCABULARY, [0, VOCABULARY - 1], "here")

"""Vision-language checkpoints, as transformers 5 and 4 lay them out, against the log-probs PyTorch computes of them.

`nested_models.json` is made by `python -m tests.helpers.make_nested_models`, with torch.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from orpo_mlx.models.loading import load
from orpo_mlx.models.vocabulary import vocabulary_of
from tests.helpers.make_nested_models import IDS, VOCABULARY
from tests.helpers.nested_checkpoints import STORED, write

# Whose names of modules and names on the Hub differ, so that versions of transformers have written either.
TWO_NAMINGS = [name for name, entry in STORED.items() if any("language_model.model." in key for key in entry["shapes"])]


def worst(folder: Path, name: str) -> float:
    logits = load(str(folder)).model(mx.array([IDS]))[0]
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    theirs: list[float] = STORED[name]["logps"]
    return max(abs(float(logps[place, token].item()) - theirs[place]) for place, token in enumerate(IDS[1:]))


@pytest.mark.parametrize("old", [False, True], ids=["5", "4"])
@pytest.mark.parametrize("name", STORED)
def test_log_probs_are_those_of_transformers(name: str, old: bool, tmp_path: Path) -> None:
    assert worst(write(tmp_path, name, old=old), name) < 1e-4


@pytest.mark.parametrize("name", [name for name in TWO_NAMINGS if name != "llama4"])
def test_either_naming_is_the_same_model(name: str, tmp_path: Path) -> None:
    assert worst(write(tmp_path, name, old=True, modules=True), name) < 1e-4


@pytest.mark.parametrize("name", STORED)
def test_ids_past_the_embedding_are_known_whatever_wraps_it(name: str, tmp_path: Path) -> None:
    assert vocabulary_of(load(str(write(tmp_path, name))).model) == VOCABULARY

"""The table of classes that read a `text_config`, held against mlx-lm's modules."""

from __future__ import annotations

from pathlib import Path

import mlx_lm.models
import pytest

from orpo_mlx.models.stored.model_classes import names_of, text_args_class

FOLDER = Path(mlx_lm.models.__file__).parent
NESTED = [file.stem for file in sorted(FOLDER.glob("*.py")) if "text_config" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", NESTED)
def test_every_module_that_reads_one_is_in_the_table(module: str) -> None:
    found = text_args_class({"model_type": module, "text_config": {}})
    assert found is not None
    assert "num_hidden_layers" in names_of(found).accepted

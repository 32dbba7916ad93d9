"""Numbers of a config that no model has, found before something is built by them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from orpo_mlx.errors import ModelError
from orpo_mlx.text import printable

# MLX's shapes are of 32 bits.
_MOST = 2**31 - 1
# The deepest models have some 130; each is built, one object after another, before any weight is looked at.
_MOST_LAYERS = 10_000
_LAYERS = re.compile(r"(num_hidden_layers|n_layers?|num_layers|block_count|num_\w*layers)")
_SIZES = re.compile(
    r"(\w*_size|\w*_sizes|\w*_dims?|\w*_rank|n_embd|n_ctx|n_positions|n_head|n_inner|\w*_heads|num_\w+|n_\w+|\w*_length"
    r"|d_model|d_ff|dim|ffn_\w+|sliding_window|\w*_kernel|\w*_window)"
)
# Ids and bounds that are no size of anything, and multiples that transformers says without a whole number.
_NOT_SIZES = re.compile(r"\w*(_id|_index|_ids|_factor|_eps|_multiplier|_ratio|max_\w+|_scale|_coef|_theta)")


def check_numbers(config: Mapping[str, Any], location: str) -> None:
    """Make sure that sizes and counts of a config, and of those inside it, are ones a model can have.

    Raises:
        ModelError: one is not.
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            if key == "text_config":
                check_numbers(value, f"{location}: {key}")
            continue
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(key, number, location)


def _check_number(key: str, number: float, location: str) -> None:
    # str() raises for a whole number of very many digits.
    shown = printable(str(number)) if number != number or abs(number) < 1e30 else "a number of over 30 digits"
    if _LAYERS.fullmatch(key) and not 0 <= number <= _MOST_LAYERS:
        raise ModelError(f"{location}: {key} is {shown}, expected a number of layers from 0 to {_MOST_LAYERS}.")
    size = _SIZES.fullmatch(key) and not _NOT_SIZES.fullmatch(key)
    # Written so that NaN, which compares with nothing, is refused too.
    if size and not abs(number) <= _MOST:
        raise ModelError(f"{location}: {key} is {shown}, which no model has; MLX's arrays hold at most {_MOST} a side.")

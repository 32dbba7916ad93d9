"""What is asked of models whose replies are judged. Imports no library, so that a command checks its flags at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROWS = 32
"""Sequences that are generated together: mlx-lm's own default for a batch that generates."""


class Sampling(NamedTuple):
    """How replies are drawn."""

    max_tokens: int
    """Of one reply, the token that ends it left out."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Probability mass of the tokens that are drawn from; 1 is all of them."""
    seed: int = 0
    template_strings: bool = True
    """Whether a prompt that is a string is put into the chat template, as a turn of the user."""


class Side(NamedTuple):
    """A model with its adapters, or without any."""

    model: str
    """Hub id, folder or `.gguf` file."""
    adapter: Path | None = None

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model} with {self.adapter}"


class Loading(NamedTuple):
    """How models are loaded."""

    dtype: str | None = None
    trust_remote_code: bool = False

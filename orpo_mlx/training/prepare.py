"""Everything a run needs, made from its settings: data, model, adapters, reference, optimiser."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from orpo_mlx.cache import cache_folder
from orpo_mlx.config.settings import TrainingConfig, data_reading, recipe
from orpo_mlx.data.sources import find_splits
from orpo_mlx.data.splits import Lengths, Split, tokenized_split
from orpo_mlx.engine.memory_modes import AUTOMATIC, MODES
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.segmented_backward import ValueAndGrad, find_walk, whole_value_and_grad
from orpo_mlx.errors import ConfigError
from orpo_mlx.losses.registry import Recipe
from orpo_mlx.models.adapters import adapter_weights, add_adapters, load_adapter_file
from orpo_mlx.models.loading import LoadedModel, check_vocabulary, find, load
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.reference import ReferenceLogProbs
from orpo_mlx.training.reference_copy import CopiedReference, copy_of
from orpo_mlx.training.reference_store import weights_fingerprint

HELD_OUT = ("test", "valid")

_OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


@dataclasses.dataclass
class Run:
    """A run that is ready to start."""

    config: TrainingConfig
    folder: Path
    splits: dict[str, Split]
    loaded: LoadedModel
    scorer: PairScorer
    method: Recipe
    reference: ReferenceLogProbs | None
    optimizer: optim.Optimizer
    memory: Memory
    first_step: int = 0
    """Steps that the adapters it goes on from have taken in its own order of the data."""
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    """The processes that train as one."""
    model_digest: str = ""
    """Of all weights as they were loaded, before adapters."""


class Memory(NamedTuple):
    """How a run spends memory."""

    mode: str
    """One of `MODES`."""
    value_and_grad: ValueAndGrad
    notes: tuple[str, ...] = ()
    """What the user should know about it."""


def prepare(
    config: TrainingConfig, hold: Callable[[Path], None] = lambda folder: None, ranks: Ranks | None = None
) -> Run:
    """Check the settings against the world and load what they name; the cheap checks come first.

    `hold` is called with the output folder as soon as it is there, before anything large is read.

    Raises:
        UserError: the first thing that is wrong.
    """
    _optimizer(config)
    reading = data_reading(config)
    sources = find_splits(config.data, HELD_OUT) if config.test else find_splits(config.data)
    if config.test:
        sources.pop("train", None)
    elif config.save_best and (config.val_batches == 0 or "valid" not in sources):
        raise ConfigError("--save-best goes by the validation loss: give a valid split and --val-batches other than 0.")
    if config.reference == "copy" and ranks is not None and ranks.size > 1:
        raise ConfigError("--reference copy: is for comparisons on one process; leave it out under mlx.launch.")
    folder = _output_folder(config.adapter_path)
    hold(folder)
    head = find(config.model, trust_remote_code=config.trust_remote_code)
    lengths = data_lengths(config, head.exact_tokens)
    splits = {name: tokenized_split(source, reading, head.tokenizer, lengths) for name, source in sources.items()}
    mx.random.seed(config.seed)
    loaded = load(head, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    for split in splits.values():
        check_vocabulary(loaded, *split.pairs.largest)
    digest = weights_fingerprint(loaded.model)
    run = assemble(config, folder, splits, loaded)
    run.model_digest = digest
    if ranks is not None:
        run.ranks = ranks
    cache = cache_folder()
    # A resumed run does not load the adapters it once began with, so a reference they are part of has no name here: the
    # checkpoint has its log-probs.
    named = not (config.resume and config.resume_adapter_file)
    # Ranks must know the same pairs, and each machine has a cache of its own.
    if run.reference is not None and cache is not None and named and run.ranks.size == 1:
        run.reference.keep_in(cache / "reference", loaded.config)
    return run


def assemble(config: TrainingConfig, folder: Path, splits: dict[str, Split], loaded: LoadedModel) -> Run:
    """A run from its settings and a model: adapters, scorer, reference, optimiser.

    Raises:
        UserError: the settings do not fit the model or the libraries.
    """
    add_adapters(loaded.model, config.fine_tune_type, config.num_layers, config.lora_parameters)
    if config.resume_adapter_file is not None and not config.resume:
        load_adapter_file(loaded.model, config.resume_adapter_file, config.lora_parameters["scale"])
    scorer, memory = spend_memory(config, loaded.model)
    fresh = config.fine_tune_type != "full" and config.resume_adapter_file is None
    method = recipe(config)
    reference: ReferenceLogProbs | None = None
    with_prompt = config.nll == "sequence"
    if config.reference == "copy":
        twin, _ = spend_memory(config, copy_of(loaded.model, base=fresh))
        reference = CopiedReference(twin, with_prompt=with_prompt)
    elif method.needs_reference:
        reference = ReferenceLogProbs(scorer, adapters_are_new=fresh, with_prompt=with_prompt)
    return Run(config, folder, splits, loaded, scorer, method, reference, _optimizer(config), memory)


def change_memory(run: Run, mode: str) -> None:
    """Let the run spend memory as another of `MODES` does."""
    run.scorer, run.memory = spend_memory(dataclasses.replace(run.config, memory=mode), run.loaded.model)
    if run.reference is not None:
        run.reference.scorer = run.scorer


def spend_memory(config: TrainingConfig, model: nn.Module) -> tuple[PairScorer, Memory]:
    """The policy's scorer, and how gradients are taken, as the settings and the model allow; "auto" as the fastest."""
    name = AUTOMATIC[0] if config.memory == "auto" else config.memory
    mode = MODES[name]
    scorer = PairScorer(
        model,
        share_prompt=mode.share_prompt and config.share_prompt,
        split_head=mode.split_head and not config.plain_head,
        lean=mode.lean,
        kept_attention_bytes=mode.kept_attention_mib << 20,
    )
    walk = None
    if mode.kept_layers < 1:
        kept = int(mode.kept_layers * len(model.layers))
        walk = find_walk(scorer, segment_layers=config.segment_layers or 1, kept_layers=kept)
    value_and_grad = walk.value_and_grad if walk else partial(whole_value_and_grad, scorer)
    missing = {
        "This model's head cannot be told apart from its body: the logits of every position are computed.": (
            mode.split_head and not config.plain_head and not scorer.splits_head
        ),
        "This model cannot share a prompt: each prompt is run once per completion.": (
            mode.share_prompt and config.share_prompt and not scorer.shares_prompt
        ),
        "This model's layers do not agree with this package's functions: they run as mlx-lm wrote them.": (
            mode.lean and not scorer.lean
        ),
        f"This model's layers cannot be run in segments: instead of --memory {name} it takes fast.": mode.kept_layers
        < 1
        and walk is None,
    }
    return scorer, Memory(name, value_and_grad, tuple(note for note, holds in missing.items() if holds))


def run_record(run: Run) -> dict[str, Any]:
    """What `run.json` holds: resolved settings, versions, data hashes, and what was loaded."""
    return {
        "settings": run.config.settings(),
        "method_parameters": run.method.parameters,
        "model_path": str(run.loaded.path),
        "model_note": run.loaded.note,
        "memory": run.memory.mode,
        "trainable_parameters": sum(array.size for array in adapter_weights(run.loaded.model).values()),
        "data": {name: _split_record(split) for name, split in run.splits.items()},
        "versions": versions(),
    }


def adapter_config(run: Run) -> dict[str, Any]:
    """What `adapter_config.json` holds: mlx-lm's keys, so that its `--adapter-path` takes the folder as it is."""
    config = run.config
    return {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": None if config.fine_tune_type == "full" else config.lora_parameters,
        "model": config.model,
        "method": config.method,
        "method_parameters": run.method.parameters,
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    packages = {name: version(name) for name in ("orpo-mlx", "mlx", "mlx-lm", "numpy", "transformers")}
    return {
        **packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(mx.default_device()),
    }


def _split_record(split: Split) -> Mapping[str, Any]:
    return {
        "path": split.source.name,
        "sha256": split.sha256,
        "shape": split.report.shape,
        "rows": split.report.rows_read,
        "pairs": len(split.pairs),
        "left_out": dict(split.report.dropped),
        "notes": dict(split.report.notes),
    }


def _optimizer(config: TrainingConfig) -> optim.Optimizer:
    schedule: Any = config.learning_rate
    if config.lr_schedule is not None:
        try:
            schedule = build_schedule(config.lr_schedule)
            float(schedule(mx.array(1)))
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"lr_schedule: {config.lr_schedule} is not a schedule of mlx-lm ({reason}).") from None
    arguments = config.optimizer_config[config.optimizer]
    try:
        return _OPTIMIZERS[config.optimizer](learning_rate=schedule, **arguments)
    except TypeError as error:
        raise ConfigError(f"optimizer_config.{config.optimizer}: {arguments} does not fit ({error}).") from None


def _output_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--adapter-path {name}: is, or lies below, a file; give a folder.") from None
    except OSError as error:
        raise ConfigError(f"--adapter-path {name}: cannot be made ({error.strerror}).") from None
    return folder


def data_lengths(config: TrainingConfig, exact_tokens: int | None) -> Lengths:
    """The longest side of a pair, and where that comes from."""
    if exact_tokens is None or config.max_seq_length <= exact_tokens:
        return Lengths(config.max_seq_length, config.truncate)
    return Lengths(exact_tokens, config.truncate, "this model's attention window, which mlx-lm does not apply,")

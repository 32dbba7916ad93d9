"""Everything a run needs, made from its settings: data, model, adapters, reference, optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from orpo_mlx.config.derived import data_reading, recipe
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.sources import Source, find_splits
from orpo_mlx.data.splits import Lengths, Split, tokenized_split
from orpo_mlx.data.tokens.token_store import RATED
from orpo_mlx.engine.memory_modes import Memory, spend_memory
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.router_loss import Routers
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.files import cache_folder, clear_temporaries
from orpo_mlx.judging.judges.judges import make_judge
from orpo_mlx.losses.recipe import Recipe
from orpo_mlx.losses.registry import COMPLETION, LIST, METHODS, PAIR
from orpo_mlx.models.adapters import add_adapters, load_adapter_file
from orpo_mlx.models.loading import LoadedModel, ModelInfo, find, load
from orpo_mlx.models.vocabulary import check_ids, vocabulary_of
from orpo_mlx.run_folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTERS_FILE,
    BEST,
    CARD_FILE,
    CHECKPOINTS,
    LEFT_OUT_FILE,
    METRICS_FILE,
    REPORT_PAGE,
    REPORT_PICTURE,
    RUN_FILE,
    SAMPLES_FILE,
)
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.optimizers import make_optimizer
from orpo_mlx.training.references.choose_reference import choose_reference, find_other_model, names_a_path
from orpo_mlx.training.references.reference_store import weights_fingerprint
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.row_values import find_weighted
from orpo_mlx.training.steps.step_functions import StepFunctions

EVAL_SPLITS = ("test", "valid")
_WRITTEN_UNDER_THE_LOCK = (
    METRICS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    CARD_FILE,
    ADAPTERS_FILE,
    ADAPTER_CONFIG_FILE,
    LEFT_OUT_FILE,
)
# Reports are drawn of a folder at any time.
_OUTPUTS = (*_WRITTEN_UNDER_THE_LOCK, REPORT_PAGE, REPORT_PICTURE)


def find_data(config: TrainingConfig, ranks: Ranks) -> dict[str, Source]:
    """The files of each split, found once the settings have been checked as far as that needs no data and no model.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_parts(config)
    sources = find_splits(config.data, EVAL_SPLITS) if config.test else find_splits(config.data)
    if config.test:
        sources.pop("train", None)
    elif config.val_batches == 0 or "valid" not in sources:
        refuse_to_wait_for_validation(config, "give a valid split and `val_batches` other than 0")
    if config.reference == "copy" and ranks.size > 1:
        raise ConfigError("`reference=copy`: is for comparisons on one process; leave it out under mlx.launch.")
    return sources


def check_parts(config: TrainingConfig) -> None:
    """Make what needs no data and no model, and throw it away: what is wrong with it is said before anything is read;
    raises ConfigError."""
    make_optimizer(config)
    data_reading(config)
    if config.judge is not None:
        make_judge(config.judge)


def refuse_to_wait_for_validation(config: TrainingConfig, remedy: str) -> None:
    """Refuse what goes by a validation, where there is none; raises ConfigError."""
    for name, asked, measure in (
        ("save_best", config.save_best and config.best_by == "loss", "loss"),
        ("patience", config.patience is not None, config.patience_on),
    ):
        if asked:
            raise ConfigError(f"`{name}` goes by the validation {measure}: {remedy}.")


def make_output_folder(name: str) -> Path:
    """The folder of `--adapter-path`, made where it is not there; ConfigError where it cannot be."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"`adapter_path` {name}: is, or lies below, a file; give a folder.") from None
    except OSError as error:
        raise ConfigError(f"`adapter_path` {name}: cannot be made ({error.strerror}).") from None
    except RecursionError:
        raise ConfigError(f"`adapter_path` {name}: lies too deep; give a shorter path.") from None
    check_outputs(folder)
    return folder


def check_outputs(folder: Path) -> None:
    """Refuse what would keep a run from writing its results once it is trained; raises ConfigError."""
    for name in _OUTPUTS:
        if (folder / name).is_dir():
            raise ConfigError(f"{folder / name}: is a folder, where a run writes a file; remove it.")
    checkpoints = folder / CHECKPOINTS
    if (checkpoints.exists() or checkpoints.is_symlink()) and not checkpoints.is_dir():
        raise ConfigError(f"{checkpoints}: is no folder, where a run keeps its checkpoints; remove it.")


def clear_for_training(folder: Path) -> None:
    """Remove what a killed run has left half written in a folder, which has to be locked.

    Raises:
        ConfigError: what stands in the place of the link to the best checkpoint is none, and may be somebody's.
    """
    best = folder / BEST
    if best.exists() and not best.is_symlink():
        what = "folder" if best.is_dir() else "file"
        raise ConfigError(f"{best}: is a {what}, where a run has a link to its best checkpoint; move it away.")
    clear_temporaries(folder, _WRITTEN_UNDER_THE_LOCK)


def load_run(config: TrainingConfig, sources: Mapping[str, Source], folder: Path, ranks: Ranks) -> Run:
    """Read the data, load the model, and put a run together.

    Args:
        config: checked settings.
        sources: from `find_data`.
        folder: receives what the run writes.
        ranks: the processes that train as one.

    Raises:
        UserError: the first thing that is wrong; the tokenizer and the data are looked at before the weights.
    """
    reading = data_reading(config)
    info = find(config.model, trust_remote_code=config.trust_remote_code)
    other = find_other_model(config, info)
    exact = [each.exact_tokens for each in (info, other) if each is not None and each.exact_tokens is not None]
    lengths = data_lengths(config, min(exact, default=None))
    splits = {name: tokenized_split(source, reading, info.tokenizer, lengths) for name, source in sources.items()}
    for split in splits.values():
        require_rows_for(split, recipe(config))
    require_accuracy(config, splits)
    weighted = find_weighted(splits, recipe(config))
    # Before the model is made and given adapters, whose first values are drawn from here.
    mx.random.seed(config.seed)
    loaded = load(info, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    vocabulary = vocabulary_of(loaded.model)
    for split in splits.values():
        token, location = split.pairs.largest
        check_ids(vocabulary, [max(token, 0)], location)
    # Before `assemble` adds adapters: a resumed run compares the weights as they came from the disk.
    digest = weights_fingerprint(loaded.model)
    run = assemble(config, folder, splits, loaded, other)
    run.max_seq_length = lengths.max_seq_length
    run.model_digest = digest
    run.reference_digest = reference_digest(run)
    run.weighted = weighted
    run.ranks = ranks
    _share_reference_table(run)
    return run


def require_rows_for(split: Split, method: Recipe) -> None:
    """Refuse rows that hold nothing of what a method learns from; raises DataError, which names the first."""
    groups = split.pairs.groups
    if groups is None:
        return
    unfit = {
        PAIR: groups.pair_counts == 0,
        COMPLETION: groups.kinds == RATED,
        LIST: groups.counts == 1,
    }[method.unit]
    if not unfit.any():
        return
    first = int(np.flatnonzero(unfit)[0])
    needs = {PAIR: "pairs", COMPLETION: "completions that are good or bad", LIST: "lists of rated completions"}
    if groups.counts[first] == 1:
        what = f"one completion with a label, from which {_methods_of(COMPLETION)} learn"
    elif method.unit == PAIR:
        what = (
            "rated completions; `pair_ratings=best_worst`, all or adjacent makes pairs of them, "
            f"{_methods_of(LIST)} take lists"
        )
    else:
        what = "rated completions; `pair_ratings=best_worst` takes the best as good and the worst as bad"
    place = split.pairs.location(first)
    raise DataError(f"{place}: method {method.expression} learns from {needs[method.unit]}, and the row holds {what}.")


def _methods_of(unit: str) -> str:
    """The methods that learn from completions, or from lists, as a sentence has them."""
    *others, last = (name for name, method in METHODS.items() if method.unit == unit)
    return f"{', '.join(others)} and {last}"


def require_accuracy(config: TrainingConfig, splits: Mapping[str, Split]) -> None:
    """Refuse to wait for an accuracy that is never measured; raises ConfigError."""
    groups = splits["valid"].pairs.groups if "valid" in splits else None
    waits = config.patience is not None and config.patience_on == "accuracy" and recipe(config).one_sided
    evaluated = None if config.val_batches == -1 else config.val_batches * config.batch_size
    if waits and groups is not None and (groups.counts[:evaluated] == 1).all():
        raise ConfigError(
            "`patience_on=accuracy`: the valid rows that are evaluated are single completions, of which none is "
            "preferred; give `patience_on=loss`."
        )


def prepare(config: TrainingConfig, ranks: Ranks | None = None) -> Run:
    """`find_data`, `make_output_folder` and `load_run` in one call, for who has nothing to do in between."""
    ranks = ranks or Ranks()
    sources = find_data(config, ranks)
    return load_run(config, sources, make_output_folder(config.adapter_path), ranks)


def reference_digest(run: Run) -> str:
    """What tells a run's reference from another's beside its own model: a name, or the content of other weights."""
    if run.reference is None or not names_a_path(run.config):
        return run.config.reference
    return weights_fingerprint(run.reference.runner.model)


def _share_reference_table(run: Run) -> None:
    """Let the reference's log-probs outlive the run, in a file that later runs with this reference find."""
    cache = cache_folder()
    # A resumed run does not load the adapters it once began with, so a reference they are part of has no name here: the
    # checkpoint has its log-probs.
    starts_from_adapters = run.config.resume_adapter_file and run.config.reference in ("start", "copy")
    named = not (run.config.resume and starts_from_adapters)
    # Ranks must know the same pairs, and each machine has a cache of its own.
    if run.reference is not None and cache is not None and named and run.ranks.size == 1:
        run.reference.keep_in(cache / "reference", run.loaded.config)


def assemble(
    config: TrainingConfig,
    folder: Path,
    splits: dict[str, Split],
    loaded: LoadedModel,
    other: ModelInfo | None = None,
) -> Run:
    """A run from its settings and a model: adapters, scorer, reference, optimiser; UserError where they do not fit.

    `other` is the model that `reference` names, where it names one.
    """
    add_adapters(
        loaded.model,
        config.fine_tune_type,
        config.num_layers,
        config.lora_parameters,
        full_model=config.full_model,
    )
    # A resumed run has its adapters from the checkpoint; it may have written over this file since.
    if config.resume_adapter_file is not None and not config.resume:
        load_adapter_file(loaded.model, config.resume_adapter_file, config.lora_parameters["scale"])
    scorer, memory = spend_memory_as(config, loaded.model)
    if config.router_aux_loss_coef > 0:
        scorer.routers = Routers(loaded.model)
    method = recipe(config)

    def make_scorer(model: nn.Module) -> PairScorer:
        return spend_memory_as(config, model)[0]

    # After the adapters are loaded: `start` and `copy` are the policy as it is at this point.
    reference = choose_reference(config, method, loaded, scorer, make_scorer, other)
    optimizer = make_optimizer(config)
    functions = StepFunctions(scorer, memory, method, optimizer)
    length = config.max_seq_length
    return Run(config, folder, splits, loaded, scorer, method, reference, optimizer, memory, functions, length)


def spend_memory_as(config: TrainingConfig, model: nn.Module) -> tuple[PairScorer, Memory]:
    """The policy's scorer, and how gradients are taken, as the settings and the model allow."""
    return spend_memory(
        model,
        config.memory,
        share_prompt=config.share_prompt,
        split_head=not config.plain_head,
        segment_layers=config.segment_layers or 1,
    )


def data_lengths(config: TrainingConfig, exact_tokens: int | None) -> Lengths:
    """The longest side of a pair, and where that comes from."""
    if exact_tokens is None or config.max_seq_length <= exact_tokens:
        return Lengths(config.max_seq_length, config.truncate)
    return Lengths(exact_tokens, config.truncate, "this model's attention window, which mlx-lm does not apply,")

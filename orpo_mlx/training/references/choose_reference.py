"""Which model a run compares with: what `reference` and `sync_reference` say, made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn

from orpo_mlx.config.defaults import REFERENCES
from orpo_mlx.config.reference_sync import sync_of
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.errors import ConfigError, ModelError, did_you_mean
from orpo_mlx.losses.recipe import Recipe
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.loading import LoadedModel, ModelInfo, find, load
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE
from orpo_mlx.training.references.other_references import (
    CopiedReference,
    SecondModel,
    SyncedReference,
    base_of,
    copy_of,
    twin_of,
    without_effect,
)
from orpo_mlx.training.references.reference import ReferenceLogProbs

_NAMES = REFERENCES.split(", ")


def names_a_path(config: TrainingConfig) -> bool:
    """Whether the reference is another model, or adapters, by its path."""
    return config.reference not in _NAMES


def is_adapter(path: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (path / ADAPTER_CONFIG_FILE).is_file() and not (path / "config.json").is_file()


def find_other_model(config: TrainingConfig, policy: ModelInfo) -> ModelInfo | None:
    """The model that `reference` names, without its weights; None where it names none.

    Raises:
        ModelError: there is no such model.
        ConfigError: it has another tokenizer.
    """
    if not names_a_path(config) or is_adapter(Path(config.reference).expanduser()):
        return None
    try:
        info = find(config.reference, trust_remote_code=config.trust_remote_code, source="`reference`")
    except ModelError as error:
        hint = did_you_mean(config.reference, _NAMES, "")
        raise ModelError(f"{str(error).rstrip('.')}{hint or '.'}") from None
    ours, theirs = policy.tokenizer, info.tokenizer
    # Rows of token ids need no tokenizer, and then there is none to compare. Further tokens of the other do no harm.
    if ours is not None and theirs is not None and not ours.get_vocab().items() <= theirs.get_vocab().items():
        raise ConfigError(
            f"`reference={config.reference}`: its tokenizer is another than that of `model`, so its log-probs would be "
            "of other tokens; give a model of the same tokenizer."
        )
    return info


def choose_reference(
    config: TrainingConfig,
    method: Recipe,
    loaded: LoadedModel,
    scorer: PairScorer,
    make_scorer: Callable[[nn.Module], PairScorer],
    other: ModelInfo | None,
) -> ReferenceLogProbs | None:
    """The reference of a run, None where the method has none.

    Args:
        config: checked settings.
        method: what the run minimises.
        loaded: the policy, with its adapters, as it starts.
        scorer: of the policy.
        make_scorer: the scorer of another model, as the settings and the model allow.
        other: from `find_other_model`.

    Raises:
        ModelError: the model or the adapters that `reference` names cannot be loaded.
    """
    if not method.needs_reference:
        return None
    with_prompt, wanted = config.nll == "sequence", method.wanted
    # Fresh adapters change nothing yet: `base` and `start` are then the same model.
    fresh = config.fine_tune_type != "full" and config.resume_adapter_file is None
    sync = sync_of(config)
    if sync is not None:
        twin = twin_of(loaded.model)
        base = config.reference == "base" and config.fine_tune_type != "full"
        return SyncedReference(
            make_scorer(without_effect(twin) if base else twin),
            loaded.model,
            *sync,
            is_start=fresh or not base,
            with_prompt=with_prompt,
            wanted=wanted,
        )
    if config.reference == "copy":
        twin = copy_of(loaded.model, base=fresh)
        return CopiedReference(make_scorer(twin), is_start=True, with_prompt=with_prompt, wanted=wanted)
    if other is not None:
        model = load(other, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        return SecondModel(make_scorer(model.model), model.config, with_prompt=with_prompt, wanted=wanted)
    if names_a_path(config):
        twin = base_of(loaded.model)
        add_trained_adapters(twin, Path(config.reference).expanduser(), "`reference`")
        return SecondModel(make_scorer(twin), with_prompt=with_prompt, wanted=wanted)
    without_adapters = fresh or (config.reference == "base" and config.fine_tune_type != "full")
    return ReferenceLogProbs(
        scorer,
        adapters_are_new=without_adapters,
        is_start=fresh or not without_adapters,
        with_prompt=with_prompt,
        wanted=wanted,
    )

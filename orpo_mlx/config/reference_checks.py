"""What settings say of the reference model, checked against each other."""

from __future__ import annotations

from orpo_mlx.config.derived import recipe
from orpo_mlx.config.reference_sync import Sync, sync_of
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError


def check_reference(config: TrainingConfig) -> None:
    """Refuse a reference that nothing is compared with, or that contradicts other settings; raises ConfigError."""
    sync = sync_of(config)
    for name, given in (("reference", config.reference != "start"), ("sync_reference", sync is not None)):
        if given and not recipe(config).needs_reference:
            raise ConfigError(f"`{name}`: method {config.method} compares with no reference; leave it out.")
    if sync is not None:
        check_sync(config, sync)
    if config.reference == "copy":
        check_copied_reference(config)
    if config.fine_tune_type == "full" and config.resume_adapter_file and config.reference not in ("start", "copy"):
        # Full weights are loaded over those of the model.
        raise ConfigError(
            f"`reference={config.reference}`: with `fine_tune_type=full`, `resume_adapter_file` takes the place of the "
            "model's weights; use `reference=start`, or name the folder of a whole model."
        )


def check_sync(config: TrainingConfig, sync: Sync) -> None:
    """Refuse a synchronised reference that cannot follow the policy; raises ConfigError."""
    if config.reference not in ("start", "base"):
        raise ConfigError(
            f"`sync_reference` moves what the run starts from; `reference={config.reference}` stays as it is: give one."
        )
    if config.precompute_reference:
        raise ConfigError(
            "`precompute_reference`: what is computed before the first step is stale once "
            "`sync_reference` has moved the reference; leave out one of them."
        )
    if config.fine_tune_type == "dora" and sync.tau < 1:
        raise ConfigError(
            f"`sync_reference={config.sync_reference}`: a mix of two DoRA models is no DoRA model; use 1 for its first "
            "number, or lora."
        )


def check_copied_reference(config: TrainingConfig) -> None:
    """Refuse a second copy of the weights where it cannot be had; raises ConfigError."""
    if config.precompute_reference:
        raise ConfigError("`reference=copy` runs the copy at every step; leave out `precompute_reference`.")
    if config.resume and config.resume_adapter_file is not None:
        raise ConfigError(
            "`reference=copy`: a resumed run no longer loads what `resume_adapter_file` names, so nothing can be "
            "copied; use `reference=start`."
        )

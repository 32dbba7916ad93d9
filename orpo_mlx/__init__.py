"""ORPO, DPO and their family in MLX."""

from __future__ import annotations

from orpo_mlx._command import end_without_traceback, is_a_command

# Before any other import, which takes time: where this process is a command, a signal now is as good as one later.
end_without_traceback()


def _prepare_process() -> None:
    from orpo_mlx.interrupts import end_early_in_one_sentence, tell

    end_early_in_one_sentence()
    if is_a_command():
        from orpo_mlx._streams import lasting_streams

        lasting_streams()
    from orpo_mlx._blas import load_blas
    from orpo_mlx._open_files import allow_fewer_files
    from orpo_mlx.text import printable

    # Both before MLX and mlx-lm are imported: a BLAS is bound as MLX is loaded, and mlx-lm sets its limit at once.
    try:
        load_blas()
    except OSError as error:
        if not is_a_command():
            raise
        # A variable that is set wrongly is for the user to mend; the command that would say so has not begun yet.
        tell(f"orpo-mlx: error: {printable(str(error))}.\n")
        raise SystemExit(2) from None
    allow_fewer_files()


_prepare_process()

# As `typing` has it, which would have to be imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from orpo_mlx.chapter import compute_odds_ratio, odds_ratio_loss, orpo_training_step
    from orpo_mlx.config.settings import TrainingConfig
    from orpo_mlx.errors import UserError
    from orpo_mlx.reporting.callbacks import TrainingCallback
    from orpo_mlx.train import train as run_training
    from orpo_mlx.training.checkpoints.progress import TrainingResult

__version__ = "0.1.0"
__all__ = [
    "TrainingCallback",
    "TrainingConfig",
    "TrainingResult",
    "UserError",
    "compute_odds_ratio",
    "odds_ratio_loss",
    "orpo_training_step",
    "run_training",
]

# Module and name of each. `train` itself cannot be re-exported: importing the submodule `orpo_mlx.train` sets the
# package's attribute of that name to the module, whatever was there.
_HOMES = {
    "TrainingCallback": ("orpo_mlx.reporting.callbacks", "TrainingCallback"),
    "TrainingConfig": ("orpo_mlx.config.settings", "TrainingConfig"),
    "TrainingResult": ("orpo_mlx.training.checkpoints.progress", "TrainingResult"),
    "UserError": ("orpo_mlx.errors", "UserError"),
    "compute_odds_ratio": ("orpo_mlx.chapter", "compute_odds_ratio"),
    "odds_ratio_loss": ("orpo_mlx.chapter", "odds_ratio_loss"),
    "orpo_training_step": ("orpo_mlx.chapter", "orpo_training_step"),
    "run_training": ("orpo_mlx.train", "train"),
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: mlx-lm and transformers take a second to import.
    if name not in _HOMES:
        raise AttributeError(f"module 'orpo_mlx' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

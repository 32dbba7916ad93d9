"""The command line of training. The module can be called as well: it is `orpo_mlx.train`, as is the function."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from orpo_mlx.config.cli import exit_status
from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.training.checkpoints.resume import settings_of_newest
from orpo_mlx.training.distributed import find_ranks
from orpo_mlx.training.evaluate_only import settings_of_adapters
from orpo_mlx.training.training import train

PROG = "orpo-mlx train"
__all__ = ["PROG", "main", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> None:
    ranks = find_ranks(TrainingConfig.rank_timeout)

    def earlier(values: Mapping[str, Any]) -> dict[str, Any]:
        if values.get("test"):
            return settings_of_adapters(values)
        if not values.get("resume"):
            return {}
        folder = values.get("adapter_path", TrainingConfig.adapter_path)
        settings = settings_of_newest(folder) if ranks.first else {}
        taken: dict[str, Any] = json.loads(ranks.from_first(json.dumps(settings).encode()))
        return taken

    train(resolve(argv, PROG, earlier), ranks=ranks)


class _Callable(ModuleType):
    """A module that is its function `train` when it is called.

    Importing a submodule sets the package's attribute of that name to the module, whatever was there. One object that
    is both is right in any order of imports.
    """

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())

"""Memory and seconds of a training step, method by method: see --help."""

from __future__ import annotations

import sys

from orpo_mlx.cli.memory import main

if __name__ == "__main__":
    sys.exit(main())

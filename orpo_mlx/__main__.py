"""`python -m orpo_mlx` is the command `orpo-mlx`."""

from __future__ import annotations

import sys

from orpo_mlx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints of every kind, in and out: see --help."""

from __future__ import annotations

import sys

from orpo_mlx.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())

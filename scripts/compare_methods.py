"""Methods trained side by side under one budget: see --help."""

from __future__ import annotations

import sys

from orpo_mlx.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())

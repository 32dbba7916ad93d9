"""ORPO, DPO and their family in MLX."""

from orpo_mlx._blas import load_blas

load_blas()

__version__ = "0.1.0"

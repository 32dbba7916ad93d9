"""The forms of quantised weights that MLX has. MLX itself is not imported here."""

from __future__ import annotations

from typing import NamedTuple

from orpo_mlx.errors import ConfigError

AFFINE_BITS = (2, 3, 4, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# Bits and group size of the modes that have one form each.
_FIXED = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
MIXED = "mixed"
"""Of a merge: affine, with more bits for the layers that the adapter has changed."""
QUANTISATION_MODES = ("affine", *_FIXED)
MIXED_BITS = 8
"""What adapted layers have in a mixed merge. At 8 bits rounding is some 16 times finer than at 4."""


class Quantisation(NamedTuple):
    """How weights are quantised."""

    bits: int
    group_size: int
    mode: str
    finer: tuple[str, ...] = ()
    """Layers that have `MIXED_BITS`."""


def quantisation(bits: int | None, group_size: int | None, mode: str) -> Quantisation:
    """Settings with what was not given filled in: affine (mixed) 4 bits in groups of 64; the others have one form each.

    Raises:
        ConfigError: MLX has no such form.
    """
    if mode in ("affine", MIXED):
        chosen = Quantisation(4 if bits is None else bits, 64 if group_size is None else group_size, mode)
        if chosen.bits not in AFFINE_BITS or chosen.group_size not in AFFINE_GROUPS:
            raise ConfigError(
                f"`bits={chosen.bits}` `group_size={chosen.group_size}`: affine quantisation has "
                f"{', '.join(map(str, AFFINE_BITS))} bits and groups of {', '.join(map(str, AFFINE_GROUPS))}."
            )
        return chosen
    only = Quantisation(*_FIXED[mode], mode)
    if bits not in (None, only.bits) or group_size not in (None, only.group_size):
        raise ConfigError(f"`mode={mode}`: has {only.bits} bits and groups of {only.group_size}, and no other form.")
    return only

"""Wilson's interval of a share (Wilson 1927)."""

from __future__ import annotations

import math

_Z_95 = 1.959963984540054


def wilson(share: float, trials: float) -> tuple[float, float]:
    """95 % interval of a share: bounds in 0..1, sensible at 0 and 1 where the normal one is not.

    Args:
        share: wins over trials, 0..1.
        trials: how many; an effective number need not be whole.

    Raises:
        ValueError: no trials.
    """
    if trials <= 0:
        raise ValueError("an interval needs at least one trial.")
    z = _Z_95
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The exact bound at 0 or all successes is 0 or 1; rounding must not leave it a hair inside.
    return (0.0 if share <= 0 else centre - half), (1.0 if share >= 1 else centre + half)

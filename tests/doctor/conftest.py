"""One small examination of this machine, for all tests of the room."""

from __future__ import annotations

import os
from typing import NamedTuple
from unittest.mock import patch

import pytest

from orpo_mlx.doctor.examine import events, examine, planned
from orpo_mlx.doctor.findings import Finding, Sizes

TINY = Sizes(
    queries=(4, 9),
    head_dims=(64,),
    dtypes=("float32",),
    half_queries=4,
    tokens=16,
    shape="tiny",
    pair=(8, 8),
    steps=1,
    product=64,
    half_product=64,
    copied=1 << 16,
)


class Examined(NamedTuple):
    findings: list[Finding]
    said: list[str]
    units: int

    def of(self, group: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.group == group]


@pytest.fixture(scope="session")
def examined() -> Examined:
    """All groups with tiny sizes, in this process."""
    units = planned(TINY, full=False, bench=True, gpu=False)
    said: list[str] = []
    # Pictures of the report are no part of what is examined, and take longer to draw than the run that they show.
    drawn = patch("orpo_mlx.reporting.run_report.png", lambda *_, **__: b"\x89PNG")
    with patch.dict(os.environ, {"ORPO_MLX_CACHE": "off"}), drawn:
        findings = examine(lambda first, say: events(units, first), said.append)
    return Examined(findings, said, len(units))

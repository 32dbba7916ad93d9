"""Graphs are counted as `mx.compile` fuses them; nothing of them is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.compile_without_kernels import fusing


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    with fusing():
        yield

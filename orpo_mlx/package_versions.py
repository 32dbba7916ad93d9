"""Versions of installed packages, as runs record them and caches go by them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version


@cache
def version_of(package: str) -> str:
    """The version of an installed package, looked up once: to tell it, Python parses the package's whole README."""
    return version(package)

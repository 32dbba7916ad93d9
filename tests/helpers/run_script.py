"""A script of `scripts/` run within this process: one of its own would import all anew for seconds."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


def run_script(name: str, argv: Sequence[str]) -> int:
    """Its exit status; what it prints goes where this process prints."""
    script = str(SCRIPTS / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code

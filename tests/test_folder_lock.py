"""Who holds an adapter folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_mlx.errors import TrainingError
from orpo_mlx.folder_lock import LOCK, is_held_by_a_living_process, locked


def test_a_second_holder_is_refused_by_the_firsts_number(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TrainingError, match=f"process {os.getpid()} is training into it"):
        locked(tmp_path).__enter__()


def test_the_living_are_told_from_the_dead(tmp_path: Path) -> None:
    assert not is_held_by_a_living_process(tmp_path)
    with locked(tmp_path):
        assert is_held_by_a_living_process(tmp_path)
    code = (
        "from pathlib import Path; from orpo_mlx.folder_lock import locked; "
        f"locked(Path({str(tmp_path)!r})).__enter__()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not is_held_by_a_living_process(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff", b"0", b"-1", b"9" * 40, b"9" * 5000])
def test_a_file_that_names_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert not is_held_by_a_living_process(tmp_path)

"""A command whose standard streams are closed, full, or read by nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orpo_mlx._streams import lasting_streams

_CODE = """
import os, sys
from pathlib import Path
from orpo_mlx.config.flags import exit_status
from orpo_mlx.errors import DataError

def command():
    print("a note", file=sys.stderr)
    print("a line")
    sys.stdout.flush()
    opened = os.open(os.devnull, os.O_RDONLY)
    Path("written").write_text(f"{sys.stdin.read()!r} {opened > 2}")
    print("more")
    %s

sys.exit(exit_status("prog", command))
"""
_FULL = "prog: error: standard output: No space left on device; free space or choose another folder.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
@pytest.mark.parametrize(
    ("streams", "end", "status", "err"),
    [
        ("<&- >&-", "", 0, "a note\n"),
        ("<&- 2>&-", "raise DataError('f:1: odd')", 2, ""),
        ("</dev/null | true", "sys.exit(0)", 0, "a note\n"),
        ("</dev/null | true", "", 0, "a note\n"),
        ("</dev/null >/dev/full", "", 2, f"a note\n{_FULL}"),
    ],
)
def test_a_command_keeps_its_status(streams: str, end: str, status: int, err: str, tmp_path: Path) -> None:
    out = "a line\nmore\n" if streams == "<&- 2>&-" else ""
    before, pipe, reader = streams.partition("|")
    # The reader is gone before anything is written.
    script = f'{{ sleep 0.2; "$0" -c "$1" {before}; echo $? > status; }} {pipe} {reader}'
    words = ["sh", "-c", script, sys.executable, _CODE % end]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ((tmp_path / "status").read_text(), done.stdout, done.stderr) == (f"{status}\n", out, err)
    # Nobody reads it, and the work goes on; where it cannot be written, that is said at once.
    if "full" not in streams:
        assert (tmp_path / "written").read_text() == "'' True"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
@pytest.mark.parametrize(
    ("words", "prog"),
    [
        ("--help", "orpo-mlx"),
        ("--version", "orpo-mlx"),
        ("train --list-methods", "orpo-mlx train"),
        ("train --help", "orpo-mlx train"),
        ("convert merge --help", "orpo-mlx convert"),
    ],
)
def test_what_is_asked_for_and_cannot_be_written_is_no_success(words: str, prog: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "orpo_mlx", *words.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, _FULL.replace("prog", prog))


def test_what_tests_and_notebooks_put_in_the_place_of_a_stream_stays(capsys: pytest.CaptureFixture[str]) -> None:
    before = (sys.stdin, sys.stdout, sys.stderr)
    lasting_streams()
    assert (sys.stdin, sys.stdout, sys.stderr) == before

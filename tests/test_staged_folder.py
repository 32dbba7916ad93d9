"""Folders that are whole or not there, whatever kills the run."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_mlx.errors import ConfigError
from orpo_mlx.files import check_space, staged_file, staged_folder

WRITER = """
import sys, time
from pathlib import Path
from orpo_mlx.files import staged_file, staged_folder
with staged_folder(Path(sys.argv[1]), overwrite=True) as folder:
    for number in range(20):
        (folder / f"{number}.txt").write_text(str(number))
        time.sleep(0.005)
"""


def test_nothing_is_there_until_all_is(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_what_was_there(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old").write_text("old")

    def fail() -> None:
        with staged_folder(target, overwrite=overwrite) as folder:
            (folder / "a").write_text("1")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert target.exists() == overwrite
    assert not overwrite or (target / "old").read_text() == "old"
    assert not list(tmp_path.glob(".out*"))


def test_an_existing_folder_is_refused_and_with_overwrite_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ConfigError, match="exists already"), staged_folder(target):
        pytest.fail("went on")
    with staged_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not a folder"), staged_folder(tmp_path / "file", overwrite=True):
        pytest.fail("went on")


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def write() -> None:
        with staged_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("2")

    with pytest.raises(ConfigError, match="exists already"):
        write()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_remnants_go_and_a_run_at_work_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.unfinished-dead").mkdir()
    (tmp_path / ".out.replaced-dead").mkdir()
    (tmp_path / ".out.replaced-dead" / "old").write_text("old")
    with staged_folder(tmp_path / "out", overwrite=True) as first:
        assert (tmp_path / "out" / "old").read_text() == "old"  # A kill between two renames: put back.
        assert not (tmp_path / ".out.unfinished-dead").exists()
        (first / "a").write_text("1")
        with staged_folder(tmp_path / "out", overwrite=True):
            assert first.exists()
        assert first.exists()
    assert (tmp_path / "out" / "a").exists()


def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1000000\.00 GB are to be written and .* are free"):
        check_space(tmp_path, 10**15)


def test_killed_at_any_moment_the_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    rng, target = random.Random(0), tmp_path / "out"
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(target)]) as process:
            time.sleep(rng.uniform(0.05, 0.45))
            process.kill()
        assert not target.exists() or len(list(target.iterdir())) == 20
    with staged_folder(target, overwrite=True) as folder:
        (folder / "last").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_with_marks_of_a_pattern_cleans_up_after_itself_alone(tmp_path: Path) -> None:
    own, other = tmp_path / ".a[1].unfinished-x", tmp_path / ".a1.unfinished-x"
    own.mkdir()
    other.mkdir()
    with staged_folder(tmp_path / "a[1]"):
        pass
    assert not own.exists()
    assert other.exists()


def test_a_staged_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    left = tmp_path / ".model.gguf.unfinished-abc"
    left.mkdir()

    def write_half() -> None:
        with staged_file(target) as file:
            file.write_text("half")
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        write_half()
    assert list(tmp_path.iterdir()) == []
    with staged_file(target) as file:
        file.write_text("whole")
        assert not target.exists()
    with pytest.raises(ConfigError, match="exists already"), staged_file(target):
        pass
    with staged_file(target, overwrite=True) as file:
        file.write_text("anew")
    assert target.read_text() == "anew"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]

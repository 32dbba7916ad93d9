"""Full disks, read-only disks and damaged files: one sentence, and the last good checkpoint is what is gone on from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.files import json_text
from orpo_mlx.training.checkpoints.folders import (
    CheckpointFolder,
    clear_unfinished,
    defect,
    prune,
    remove_all,
    whole_checkpoints,
    write_checkpoint,
)
from orpo_mlx.training.checkpoints.resume import newest
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from tests.helpers.kill_and_resume import records, same
from tests.helpers.quiet_training import flags, run_quietly
from tests.training.checkpoints.test_resume import LONG, interrupted

FILES = ("adapters.safetensors", "adapter_config.json", "manifest.json", "optimizer.safetensors", "state.json")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def write_small(parent: Path, step: int, text: str = "content") -> CheckpointFolder:
    def write(folder: Path) -> None:
        (folder / "state.json").write_text(text)

    return write_checkpoint(parent, step, write)


def whole_steps(parent: Path) -> list[int]:
    return [found.step for found in whole_checkpoints(parent) if isinstance(found, CheckpointFolder)]


def test_checkpoints_are_listed_by_step_and_pruned(tmp_path: Path) -> None:
    for step in (9, 10, 100, 2):
        write_small(tmp_path, step)
    assert whole_steps(tmp_path) == [100, 10, 9, 2]
    (tmp_path / "step-12").mkdir()
    (tmp_path / ".writing-0000200").mkdir()
    prune(tmp_path, 2, 100, also=[2])
    assert whole_steps(tmp_path) == [100, 10, 2]
    # Later ones are damaged, or the run would not be at an earlier step: they take nobody's place.
    write_small(tmp_path, 11)
    (tmp_path / "step-0000100" / "manifest.json").unlink()
    prune(tmp_path, 1, 11)
    assert whole_steps(tmp_path) == [11]
    remove_all(tmp_path)
    assert not tmp_path.exists()


def test_a_checkpoint_that_is_written_anew_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(tmp_path, 7)
    rename = Path.rename
    for at in (1, 2, 3):
        renames = 0

        def killed(self: Path, target: Path, at: int = at) -> Path:
            nonlocal renames
            renames += 1
            found = rename(self, target)
            if renames == at:
                raise KeyboardInterrupt
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                write_small(tmp_path, 7)
        assert 7 in whole_steps(tmp_path)
        clear_unfinished(tmp_path)
        assert whole_steps(tmp_path) == [7]
    write_small(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000007"]


def test_a_checkpoint_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    write_small(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "state.json").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*step-0000002'"):
        write_checkpoint(tmp_path, 2, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ("", "is not one"),
        ("[]", "is not one"),
        ('{"format": 1, "step": 1}', "is not one"),
        ('{"format": 2, "step": 1, "files": {}}', "is of format 2"),
        ('{"format": 1, "step": 7, "files": {}}', "and step 7"),
        ('{"format": 1, "step": 1, "files": {}}', "names no files"),
        ('{"format": 1, "step": 1, "files": {"../1/state.json": {"bytes": 7, "sha256": ""}}}', "not a file of"),
        ('{"format": 1, "step": 1, "files": {"link.json": {"bytes": 7, "sha256": ""}}}', "not a file of"),
        ('{"format": 1, "step": 1, "files": {"other.json": {"bytes": 7, "sha256": ""}}}', "other.json is missing"),
        ("[" * 100_000, "is not one"),
    ],
)
def test_a_manifest_that_proves_nothing(tmp_path: Path, manifest: str, expected: str) -> None:
    folder = write_small(tmp_path, 1).path
    assert defect(folder, 1) is None
    (folder / "link.json").symlink_to("state.json")
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        manifest = json_text(json.loads(manifest))
    (folder / "manifest.json").write_text(manifest)
    assert expected in str(defect(folder, 1))


@pytest.mark.parametrize("method", [pytest.param("orpo", marks=pytest.mark.slow), "dpo"])
def test_a_checkpoint_damaged_in_any_file_is_passed_by(
    settings: dict[str, Any], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {**LONG, "method": method}
    whole = Path(settings["adapter_path"]).with_name("whole")
    run_quietly({**settings, "adapter_path": str(whole)})
    folder = interrupted(settings, 7)
    last = folder / "checkpoints" / "step-0000006"
    names = sorted(path.name for path in last.iterdir())
    assert names == sorted([*FILES, *(["reference.safetensors"] if method == "dpo" else [])])
    for name in names:
        content = (last / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:-1], b"", None):
            if damaged is None:
                (last / name).unlink()
            else:
                (last / name).write_bytes(damaged)
            found, (problem,) = newest(folder)
            assert found is not None
            assert found.step == 4
            assert name in problem or name == "manifest.json"
        (last / name).write_bytes(content)
    assert newest(folder)[0] == CheckpointFolder(last, 6)
    (last / "optimizer.safetensors").write_bytes(b"\0")
    assert main(["--resume", "--adapter-path", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{last} is not whole (optimizer.safetensors has 1 bytes, expected " in out
    assert "Goes on from step 4" in out
    assert same(whole, folder)


def test_no_whole_checkpoint_is_not_a_fresh_start(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted({**settings, **LONG}, 3)
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").unlink()
    assert main([*flags({**settings, **LONG}), "--resume"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "step-0000002 is not whole (state.json is missing)" in err


def test_a_full_disk_ends_a_run_with_a_sentence_and_more_room_lets_it_go_on(
    settings: dict[str, Any], tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {**LONG, "save_every": 1, "keep": 100}
    run_quietly(settings)
    argv = [*flags(settings), "--adapter-path", str(disk / "adapters")]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(r"(cannot be saved|No space left).*; step \d is saved, go on with orpo-mlx", err), err
    checkpoint, problems = newest(disk / "adapters")
    assert checkpoint is not None
    assert problems == []
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert main([*argv, "--resume"]) == 0
    assert same(Path(settings["adapter_path"]), disk / "adapters")


def test_a_disk_that_becomes_read_only(
    settings: dict[str, Any], disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(run: Run, pairs: Any, number: int) -> Any:
        if number == 6:
            # As a kernel does after an error: files that are open for writing count no more.
            handle = os.open(disk, os.O_RDONLY)
            os.close(handle)
            subprocess.run(["mount", "-o", "remount,ro,size=10m", str(disk)], capture_output=True)
            for name in ("mkdir", "open"):
                monkeypatch.setattr(os, name, _read_only(getattr(os, name), disk))
        return optimiser_step(run, pairs, number)

    monkeypatch.setattr("orpo_mlx.training.loop.optimiser_step", step)
    assert main([*flags({**settings, **LONG}), "--keep", "1", "--adapter-path", str(disk / "adapters")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "step-0000006: cannot be saved (Read-only file system)" in err
    assert "step 4 is saved, go on with" in err


def _read_only(function: Any, disk: Path) -> Any:
    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith(str(disk)):
            raise OSError(30, "Read-only file system", str(path))
        return function(path, *arguments, **options)

    return refuse


def test_a_size_limit_below_the_first_checkpoint(settings: dict[str, Any]) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    argv = [sys.executable, "-m", "orpo_mlx.train", *flags(settings)]
    environment = {**os.environ, "ORPO_MLX_CACHE": "off"}
    done = subprocess.run(argv, capture_output=True, text=True, preexec_fn=limit, env=environment, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "step-0000003: cannot be saved" in done.stderr
    folder = Path(settings["adapter_path"])
    assert newest(folder) == (None, [])
    assert not (folder / "adapters.safetensors").exists()
    assert [row["step"] for row in records(folder)] == [0, 1, 2, 3]

"""Files are written whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from orpo_mlx.data.readers import read_rows
from orpo_mlx.data.sources import find_splits
from orpo_mlx.errors import ConfigError, DataError, ModelError, UserError
from orpo_mlx.files import (
    clear_temporaries,
    flush_to_disk,
    read_json_table,
    save_adapters,
    save_json,
    sha256_of,
    staged_file,
    staged_folder,
    write_atomically,
)
from orpo_mlx.judging.make_pairs import read_samples as read_drawn
from orpo_mlx.reporting.live.feed import lines_after
from orpo_mlx.reporting.metrics_log import read_run
from orpo_mlx.reporting.resumable_jsonl import LineFile


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*file.txt'"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_has_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    left = (".adapters.ab_d0f9h.safetensors", ".run.abcdefgh.json")
    kept = (".adapters.mine.safetensors", ".adapters.abcdefgh.npz", ".other.abcdefgh.json", "run.json", ".run.json")
    for name in (*left, *kept):
        (tmp_path / name).touch()
    (tmp_path / ".run.abcdefgi.json").mkdir()
    clear_temporaries(tmp_path, ["adapters.safetensors", "run.json"])
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".run.abcdefgi.json"}

    def written(temporary: Path) -> None:
        # Names as they are made today.
        clear_temporaries(tmp_path, ["run.json"])
        assert not temporary.exists()
        temporary.touch()

    write_atomically(tmp_path / "run.json", written)


def test_a_folder_that_is_gone_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"'.*gone/file.txt'"):
        write_atomically(tmp_path / "gone" / "file.txt", lambda temporary: None)


def test_adapters_are_readable_and_named_as_mlx_lm_names_them(tmp_path: Path) -> None:
    weights = {"a.lora_a": mx.arange(4.0)}
    save_adapters(tmp_path, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.safetensors"]
    for path in tmp_path.iterdir():
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        assert mx.array_equal(loaded["a.lora_a"], weights["a.lora_a"]).item()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_what_is_written_has_the_mode_that_open_would_have_given(umask: int, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.touch()
    kept.chmod(0o640)
    before = os.umask(umask)
    try:
        for path in (kept, tmp_path / "new.json"):
            save_json(path, {})
        for path in (tmp_path / "a.gguf", kept):
            with staged_file(path, overwrite=True) as file:
                file.touch()
        with staged_folder(tmp_path / "folder") as folder:
            (folder / "b.json").touch()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    file_mode = 0o666 & ~umask
    files = {"new.json": file_mode, "a.gguf": file_mode, "b.json": file_mode, "kept.json": 0o640}
    assert modes == {**files, "folder": 0o777 & ~umask}


def test_a_full_disk_leaves_the_last_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapters(tmp_path, {"a": mx.arange(4.0)})
    before = (tmp_path / "adapters.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise RuntimeError("[write] Unable to write 745 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match=r"Unable to write 745 bytes to file: '.*adapters.safetensors'"):
        save_adapters(tmp_path, {"a": mx.arange(5.0)})
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.safetensors"]
    assert (tmp_path / "adapters.safetensors").read_bytes() == before


def test_json_is_utf8(tmp_path: Path) -> None:
    save_json(tmp_path / "run.json", {"name": "é", "path": Path("x")})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"name": "é", "path": "x"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "settings.json: no such file"),
        (b"{", "settings.json: cannot be read as JSON"),
        (b"\xff\xfe", "settings.json: cannot be read as JSON"),
        (b"[" * 200_000, "settings.json: cannot be read as JSON"),
        (b"[1]", "settings.json: holds a list, expected a table"),
    ],
)
@pytest.mark.parametrize("error", [ConfigError, DataError])
def test_what_is_no_json_table_is_said(
    content: bytes | None, expected: str, error: type[UserError], tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=expected):
        read_json_table(path, error)


def test_a_table_too_large_for_settings_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # Sparse: takes no room.
    with pytest.raises(ModelError, match="1099511627776 bytes is no JSON settings file"):
        read_json_table(path, ModelError)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: [*read_rows(path)],
        lambda path: find_splits(path),
        lambda path: read_run(path.parent),
        lambda path: lines_after(path, ""),
        lambda path: LineFile(path),
        lambda path: read_drawn(path, 1),
    ],
)
def test_a_pipe_is_refused_where_reading_it_would_wait_for_ever(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises((DataError, OSError), match=r"a device or pipe|is not what pairs wrote"):
        read(path)


def test_a_hash_is_that_of_all_content_in_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"ab" * 1_000_000)
    two.write_bytes(b"c")
    assert sha256_of(one, two, head=b"x") == hashlib.sha256(b"x" + b"ab" * 1_000_000 + b"c").hexdigest()


@pytest.mark.parametrize("refused", [False, True])
def test_macos_flushes_the_drive_and_falls_back_to_fsync(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def full_fsync(*_: object) -> None:
        called.append("F_FULLFSYNC")
        if refused:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_fsync)
    monkeypatch.setattr(os, "fsync", lambda _: called.append("fsync"))
    flush_to_disk(tmp_path)
    assert called == (["F_FULLFSYNC", "fsync"] if refused else ["F_FULLFSYNC"])

"""Files are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from orpo_mlx.files import save_adapters, save_json, write_atomically


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
        assert path.stat().st_mode & 0o777 == 0o644


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

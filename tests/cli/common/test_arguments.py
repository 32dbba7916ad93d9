"""What commands check of their arguments before they work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orpo_mlx.cli.common.arguments import check_output_file
from orpo_mlx.errors import ConfigError


def test_an_output_is_a_file_or_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    assert check_output_file("--json", tmp_path / "new") == tmp_path / "new"
    # Nothing is there yet: what is written must be there then, and the link stay one.
    assert check_output_file("--json", tmp_path / "link") == (tmp_path / "folder" / "file").resolve()


def test_a_device_or_a_pipe_is_no_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (Path(os.devnull), tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(ConfigError, match=f"^--json {path}: is a device or pipe, expected a file"):
            check_output_file("--json", path)


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, whatever the folder's mode.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match=r"x\.json: this user may not write into "):
        check_output_file("--json", tmp_path / "x.json")

"""What commands check of their arguments before they work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orpo_mlx.cli import convert, evaluate, inspect, pairs, score
from orpo_mlx.cli.common.arguments import check_apart, check_output_file, check_replaced
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


def test_an_output_in_the_place_of_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "d" / "train.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    (tmp_path / "hard.jsonl").hardlink_to(data)
    for output, read in ((data, data), (data, data.parent), (tmp_path / "hard.jsonl", data.parent)):
        with pytest.raises(ConfigError, match=f"^--json {output}: is what --data names or has in it, and would be"):
            check_apart("--json", output, {"--data": read})
    check_apart("--json", data.parent / "figures.txt", {"--data": data.parent, "--more": None})
    with pytest.raises(ConfigError, match="is what --json names"):
        check_apart("--replies", tmp_path / "new", {"--json": tmp_path / "d" / ".." / "new"})


def test_a_destination_that_holds_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "models" / "base"
    source.mkdir(parents=True)
    for destination in (source, source.parent):
        with pytest.raises(ConfigError, match=f"^{destination}: is what --model names or has it in it"):
            check_replaced(destination, {"SRC": None, "--model": str(source)})
    check_replaced(source / "mlx", {"SRC": str(source)})
    # A shard by an odd name, as an index may have it; and what an earlier conversion has left there.
    (source / "shard.gguf").write_bytes(b"safetensors")
    (source / "left.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"shard\.gguf: is one of the files of SRC .*base, and would be lost"):
        check_replaced(source / "shard.gguf", {"SRC": str(source)})
    check_replaced(source / "left.gguf", {"SRC": str(source)})
    check_replaced(source, {"SRC": "owner/name"})


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (score.main, "--data {d}/train.jsonl --output {d}/train.jsonl"),
        (inspect.main, "--data {d} --json {d}/train.jsonl"),
        (inspect.main, "--data {d} --png {d}/train.jsonl"),
        (evaluate.main, "--data {d} --judge rule:plain --replies {d}/train.jsonl"),
        (evaluate.main, "--data {d} --judge rule:plain --replies {d}/new --json {d}/new"),
        (pairs.main, "--data {d} --judge rule:plain --output {d}/train.jsonl --overwrite"),
        (convert.main, "hf {d} {d} --overwrite"),
        (convert.main, "merge --model {d} --adapter-path {d}/no {d} --overwrite"),
        (convert.main, "merge --model owner/name --adapter-path {d} {d} --overwrite"),
    ],
)
def test_commands_keep_what_they_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    words: str,
) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    assert main(words.format(d=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert "and would be lost; give another" in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "train.jsonl").read_text() == "{}"

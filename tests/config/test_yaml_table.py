"""Files that hold no table of settings are one sentence, whichever command reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.config.command_line import read_config_file
from orpo_mlx.config.yaml_table import read_yaml_table
from orpo_mlx.errors import ConfigError
from orpo_mlx.rounds.settings import read_rounds_config

READERS = (read_config_file, read_rounds_config)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b", "found a list, expected a table of settings"),
        ("", "found nothing, expected a table of settings"),
        ("a: [1", "not valid YAML"),
        (f"lora_parameters: {'[' * 2000}{']' * 2000}", "not valid YAML (nested too deeply)"),
        (f"{'- ' * 2000}a", "not valid YAML (nested too deeply)"),
        (f"iters: {'9' * 5000}", "not valid YAML (Exceeds the limit"),
        ("iters: 1\nseed: 2\n'iters': 3\n", "line 3: key 'iters' is given twice; keep one."),
        ("lora_parameters:\n  rank: 1\n  rank: 2\n", "line 3: key 'rank' is given twice; keep one."),
        ("iters: 2024-13-01", "not valid YAML (month must be in 1..12)"),
        ('iters: !!int ""', "not valid YAML ("),
        (b"\xff\xfe\0", "not a text file in UTF-8, expected YAML."),
    ],
)
def test_what_is_no_table_names_the_file(
    tmp_path: Path, text: str | bytes, expected: str, reader: Callable[[Path], Any]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        reader(file)
    assert f"{file}: {expected}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"run\.yaml: is no regular file, expected YAML\.$"):
        reader(tmp_path / "run.yaml")


def test_a_key_may_override_what_is_merged(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    table = read_yaml_table(tmp_path / "run.yaml", "run.yaml")
    assert table["b"] == {"x": 3, "y": 2}

"""Text that is safe to print, on any terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from orpo_mlx.cli.main import COMMANDS, main
from orpo_mlx.text import quoted, spell_unprintable
from tests.conftest import write_rows


class Narrow:
    """Standard output as a terminal or a pipe with a narrow encoding has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self._bytes = io.BytesIO()
        self._encoding = encoding
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self._bytes, encoding=encoding, errors="strict"))

    def printed(self) -> str:
        """What has arrived, since it was last asked for."""
        sys.stdout.flush()
        text = self._bytes.getvalue().decode(self._encoding)
        self._bytes.seek(0)
        self._bytes.truncate()
        return text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_what_an_encoding_lacks_is_spelled_as_json_spells_it(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    narrow = Narrow(monkeypatch, encoding)
    spell_unprintable()
    text = "⟦β⟧ 👩\u200d🚀 \ud800 café"
    print(json.dumps({"text": text}, ensure_ascii=False))
    assert json.loads(narrow.printed()) == {"text": text}


def test_every_command_prints_in_ascii(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> None:
    narrow = Narrow(monkeypatch, "ascii")
    for command in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert "usage:" in narrow.printed()
    with pytest.raises(SystemExit):
        main(["train", "--list-methods"])
    assert "\\u03b2" in narrow.printed()
    rows = write_rows(tmp_path / "zeilen-ü.jsonl", [{"prompt": "Ärger?", "chosen": "Ja 👩‍🚀", "rejected": "Nein"}])
    inspect = ["inspect", "--data", str(rows), "--model", str(model_folder)]
    assert main(inspect) == 0
    assert "\\u27e6Ja" in narrow.printed()
    assert main([*inspect, "--json"]) == 0
    assert "Ärger" in json.loads(narrow.printed())["splits"]["train"]["examples"][0]["prompt"]


def test_a_quoted_value_is_short_whatever_it_is() -> None:
    assert quoted("a") == "'a'"
    assert len(quoted("a" * 1000)) == 100
    assert quoted(1 << 20000) == "a number of thousands of digits"
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    assert len(quoted(nested)) <= 100

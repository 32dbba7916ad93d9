"""The chapter's claims stand in one place."""

from __future__ import annotations

from pathlib import Path

from orpo_mlx.compare import claims


def test_no_other_module_spells_a_claim_or_a_word_of_a_verdict() -> None:
    texts = [value for name, value in vars(claims).items() if name.isupper() and " " in value]
    assert len(texts) == 7
    room = Path(str(claims.__file__)).parent
    homes = {path.name for path in room.rglob("*.py") for text in texts if f'"{text}"' in path.read_text("utf-8")}
    assert homes == {"claims.py"}

"""Sample replies."""

from __future__ import annotations

from pathlib import Path

from orpo_mlx.models import load
from orpo_mlx.samples import MAX_TOKENS, pick_prompts, sample_replies
from orpo_mlx.types import Pair


def pairs(count: int) -> list[Pair]:
    return [Pair(f"Q{number}", "A", "B", f"f:{number}") for number in range(count)]


def test_prompts_are_spread_over_the_split() -> None:
    assert [pair.prompt for pair in pick_prompts(pairs(100), 4)] == ["Q12", "Q37", "Q62", "Q87"]
    assert len(pick_prompts(pairs(2), 5)) == 2
    assert pick_prompts(pairs(3), 0) == []


def test_replies_are_greedy_bounded_and_leave_the_mode_alone(model_folder: Path) -> None:
    loaded = load(str(model_folder))
    loaded.model.train()
    conversation = Pair(({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), "A", "B", "f:1")
    first, second = (sample_replies(loaded.model, loaded.tokenizer, [pairs(1)[0], conversation]) for _ in range(2))
    assert first == second
    assert [reply.prompt for reply in first] == ["Q0", "u"]
    assert all(1 <= reply.tokens <= MAX_TOKENS for reply in first)
    assert loaded.model.training

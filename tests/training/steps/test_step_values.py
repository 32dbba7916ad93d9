"""Prompts with another prompt's completions."""

from __future__ import annotations

from orpo_mlx.training.steps.step_values import mismatched
from orpo_mlx.types import Example, TokenizedGroup

A, B, C = (7,), (8, 8), (9, 9, 9)


def row(prompt: tuple[int, ...], *completions: tuple[int, ...]) -> TokenizedGroup:
    return TokenizedGroup(prompt, completions, (1.0,) * len(completions), True, (), "f:1")


def crossed(examples: list[Example], limit: int = 100) -> dict[tuple[int, ...], list[tuple[tuple[int, ...], ...]]]:
    found: dict[tuple[int, ...], list[tuple[tuple[int, ...], ...]]] = {}
    for each in mismatched(examples, limit):
        found.setdefault(each.prompt_ids, []).append(each.completions)
    return found


def test_each_prompt_has_the_completions_of_the_one_before() -> None:
    assert crossed([row(A, (1,)), row(B, (2,)), row(C, (3,))]) == {A: [((3,),)], B: [((1,),)], C: [((2,),)]}


def test_no_prompt_has_its_own_completions() -> None:
    rows: list[Example] = [row(A, (1,)), row(A, (2,)), row(B, (3,)), row(A, (4,))]
    # In a circle: before the first two stands the B, past the last of their own.
    assert crossed(rows) == {A: [((3,),)] * 3, B: [((2,),)]}
    assert mismatched(rows[:2], 100) == mismatched(rows[:1], 100) == mismatched([], 100) == []


def test_what_is_longer_than_rows_may_be_is_cut() -> None:
    rows: list[Example] = [row(A, (1, 2, 3), (~1, ~2, 4)), row(C, (5, 6))]
    # One token fits behind C: of the second completion of A that is none that is learned.
    assert crossed(rows, 4) == {A: [((5, 6),)], C: [((1,),)]}
    assert crossed(rows, 3) == {A: [((5, 6),)]}

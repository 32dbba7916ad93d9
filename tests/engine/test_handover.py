"""What a device is given, and when."""

from __future__ import annotations

import mlx.core as mx
import pytest

from orpo_mlx.engine.handover import Handover


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (0, ["wait 0", "wait 1", "wait 2", "wait 3", "wait 4", "wait 5"]),
        (1, ["begin 2"]),
        (2, ["begin 1", "begin 3"]),
        # More than there are pieces: the last is the caller's all the same.
        (9, ["begin 0", "begin 1", "begin 2", "begin 3", "begin 4"]),
    ],
)
def test_a_pass_is_given_in_parts(parts: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(mx, "async_eval", lambda tree: events.append(f"begin {tree[0]}"))
    monkeypatch.setattr(mx, "eval", lambda tree: events.append(f"wait {tree[0]}"))
    work = Handover(6, parts)
    for number in range(6):
        work.piece(number)
    assert events == expected


def test_arrays_are_the_same_after_others() -> None:
    work, array = Handover(2, 1), mx.arange(3)
    (later,) = work.after([array], {"a": mx.ones(2), "b": (mx.zeros(1),)})
    assert mx.array_equal(later, array).item()
    assert work.after([], [array]) == ()
    assert Handover(2, 0).after([array], [later])[0] is array

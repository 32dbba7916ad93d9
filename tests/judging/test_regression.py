"""What was kept, gained and lost, and McNemar's test."""

from __future__ import annotations

import itertools

import pytest

from orpo_mlx.judging.regression import compare_items, mcnemar, regression_figures, regression_line


def test_items_are_compared_one_by_one() -> None:
    before = dict(zip("abcdef", (True, True, True, False, False, True), strict=True))
    after = dict(zip("fedcba", (True, False, True, False, True, True), strict=True))
    found = compare_items(before, after)
    assert (found.kept, found.gained, found.lost, found.missed) == (3, 1, 1, 1)
    assert (found.before, found.after) == (4 / 6, 4 / 6)
    assert found.p_value == 1
    assert regression_figures(found)["items"] == 6
    assert "3 kept, 1 gained, 1 lost, 1 missed" in regression_line("t", found)
    with pytest.raises(ValueError, match="the same items"):
        compare_items(before, {"a": True})


@pytest.mark.parametrize("changed", range(1, 11))
def test_p_is_the_share_of_all_signs_that_lie_at_least_so_far_apart(changed: int) -> None:
    signs = [sum(each) for each in itertools.product((0, 1), repeat=changed)]
    for gained in range(changed + 1):
        far = sum(abs(2 * other - changed) >= abs(2 * gained - changed) for other in signs)
        assert mcnemar(gained, changed - gained) == pytest.approx(far / len(signs))
    assert mcnemar(0, 0) == 1

"""A loss carries its card, and `orpo_mlx.losses` has every loss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orpo_mlx import losses
from orpo_mlx.losses.recipe import make_recipe
from orpo_mlx.losses.registry import METHODS, Positive, preference_loss
from orpo_mlx.types import LossOutput, PairLogProbs


@pytest.fixture
def own_losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses that a test registers are gone after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_the_folder_exports_every_loss_and_nothing_else() -> None:
    assert losses.__all__ == list(METHODS)
    assert all(getattr(losses, name) is method.loss for name, method in METHODS.items())


def test_a_loss_shows_its_card() -> None:
    for method in METHODS.values():
        shown = str(method.loss.__doc__)
        assert method.equation in shown
        assert method.source in shown


@pytest.mark.usefixtures("own_losses")
def test_a_card_makes_a_function_a_method() -> None:
    @preference_loss(equation="s_l - β s_w", source="nobody")
    def own(logps: PairLogProbs, *, beta: Positive = 0.25) -> LossOutput:
        """Mine."""
        return LossOutput(logps.rejected - beta * logps.chosen, *logps[:4])

    method = METHODS["own"]
    assert method.loss is own
    assert (method.equation, method.source) == ("s_l - β s_w", "nobody")
    assert not method.needs_reference
    assert not method.couples_pairs
    assert method.defaults == {"beta": 0.25}
    assert make_recipe("2*own", {"beta": 3.0}).parameters == {"own": {"beta": 3.0}}


@pytest.mark.usefixtures("own_losses")
def test_a_name_is_taken_once() -> None:
    def dpo(logps: PairLogProbs) -> LossOutput:
        """Another."""
        return LossOutput(logps.nll, *logps[:4])

    with pytest.raises(ValueError, match="there is a loss dpo already"):
        preference_loss(equation="0", source="nobody")(dpo)


@pytest.mark.usefixtures("own_losses")
def test_a_parameter_says_its_range() -> None:
    def own(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
        """Mine."""
        return LossOutput(beta * logps.nll, *logps[:4])

    with pytest.raises(ValueError, match="own: annotate beta"):
        preference_loss(equation="0", source="nobody")(own)

"""The registry."""

from __future__ import annotations

import pytest

from orpo_mlx.errors import ConfigError
from orpo_mlx.methods import METHODS, bind, get_method, resolve_parameters
from tests.test_losses import as_logps, grid


def test_defaults_come_from_the_losses() -> None:
    assert METHODS["orpo"].defaults == {"beta": 0.1}
    assert METHODS["orpo_style"].defaults == {"beta": 0.5}
    assert METHODS["sft"].defaults == {}


def test_given_parameters_override_and_none_does_not() -> None:
    assert resolve_parameters("orpo", {"beta": 0.7}) == {"beta": 0.7}
    assert resolve_parameters("orpo", {"beta": None}) == {"beta": 0.1}


def test_a_parameter_the_method_does_not_have() -> None:
    with pytest.raises(ConfigError, match="--beta: method sft has no such parameter; it has no parameters"):
        resolve_parameters("sft", {"beta": 0.1})


def test_a_misspelt_method_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--method orop: unknown method.*did you mean orpo"):
        get_method("orop")


def test_bound_parameters_reach_the_loss() -> None:
    logps = as_logps(grid())
    one, two = (bind("dpo", {"beta": beta})(logps).chosen_rewards for beta in (0.1, 0.2))
    assert (two == 2 * one).all().item()


def test_only_dpo_asks_for_a_reference() -> None:
    assert [name for name, method in METHODS.items() if method.needs_reference] == ["dpo"]

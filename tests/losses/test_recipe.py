"""The registry, sums of methods, and their parameters."""

from __future__ import annotations

import numpy as np
import pytest

from orpo_mlx.errors import ConfigError
from orpo_mlx.losses import bco_pair, dpo, sft
from orpo_mlx.losses.recipe import ALIASES, PARAMETERS, describe_methods, make_recipe, parse_terms
from orpo_mlx.losses.registry import METHODS
from tests.losses.test_losses import as_logps, grid


def test_defaults_come_from_the_losses() -> None:
    assert METHODS["orpo"].defaults == {"beta": 0.1}
    assert METHODS["orpo_style"].defaults == {"beta": 0.5}
    assert METHODS["sft"].defaults == {}


def test_every_parameter_of_every_method_can_be_given() -> None:
    assert {key for method in METHODS.values() for key in method.defaults} == set(PARAMETERS)


def test_given_parameters_override_and_none_does_not() -> None:
    assert make_recipe("orpo", {"beta": 0.7}).parameters == {"orpo": {"beta": 0.7}}
    assert make_recipe("orpo", {"beta": None}).parameters == {"orpo": {"beta": 0.1}}


def test_bound_parameters_reach_the_loss() -> None:
    logps = as_logps(grid())
    one, two = (make_recipe("dpo", {"beta": beta}).loss(logps).chosen_rewards for beta in (0.1, 0.2))
    assert (two == 2 * one).all().item()


def test_a_sum_is_the_weighted_sum_and_logs_its_first_term() -> None:
    logps = as_logps(grid())
    recipe = make_recipe("0.8*sigmoid + 0.2*bco_pair+sft", {"beta": 0.3})
    expected = 0.8 * dpo(logps, beta=0.3).losses + 0.2 * bco_pair(logps, beta=0.3).losses + sft(logps).losses
    found = recipe.loss(logps)
    np.testing.assert_allclose(np.array(found.losses), np.array(expected), rtol=1e-6)
    assert (found.chosen_rewards == dpo(logps, beta=0.3).chosen_rewards).all().item()
    assert recipe.needs_reference
    assert recipe.parameters == {
        "dpo": {"beta": 0.3, "label_smoothing": 0.0},
        "bco_pair": {"beta": 0.3, "delta": 0.0},
        "sft": {},
    }


def test_a_sum_needs_what_any_term_needs() -> None:
    assert not make_recipe("orpo + sft", {}).needs_reference
    assert make_recipe("sft + aot", {}).couples_pairs
    assert not make_recipe("sft + dpo", {}).couples_pairs


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("orop", r"`method` orop: no method 'orop', expected one of .*did you mean orpo"),
        ("dpo + sfft", "no method 'sfft'.*did you mean sft"),
        ("sigmoid + dpo", "stands in the sum twice"),
        ("dpo + ", "cannot read the term ''"),
        ("-1*dpo", "cannot read the term"),
        ("0*dpo", "cannot read the term"),
        ("1e-*dpo", "cannot read the term"),
        ("2 dpo", "cannot read the term '2 dpo'"),
    ],
)
def test_a_method_that_cannot_be_read(expression: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_terms(expression)


@pytest.mark.parametrize(
    ("expression", "given", "expected"),
    [
        ("sft", {"beta": 0.1}, "`beta`: method sft has no such parameter; it has no parameters"),
        (
            "simpo",
            {"label_smoothing": 0.1},
            "`label_smoothing`: method simpo has no such parameter; it has `beta`, `gamma`",
        ),
        ("dpo + slic", {"tau": 0.1}, "it has `alpha`, `beta`, `delta`, `label_smoothing`"),
        ("robust", {"label_smoothing": 0.5}, "`label_smoothing`: found 0.5, expected a number 0 or more and below 0.5"),
        ("dpo", {"beta": 0.0}, "`beta`: found 0, expected a number above 0"),
        ("discopop", {"tau": 1.0}, "`tau`: found 1, expected a number above 0 and below 1"),
        ("exo_pair", {"label_smoothing": 0.0}, "above 0 and below 0.5 for exo_pair"),
    ],
)
def test_a_parameter_that_does_not_fit(expression: str, given: dict[str, float], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_recipe(expression, given)


def test_the_list_tells_everything_about_each_method() -> None:
    text = describe_methods()
    for name, method in METHODS.items():
        block = text.split(f"{name}\n  loss")[1].split("\n\n")[0]
        assert method.equation in block
        assert method.source in block
        assert ("reference   needed" in block) == method.needs_reference
        assert all(f"{key}={value:g}" in block for key, value in method.defaults.items())
    assert all(alias in text for alias in ALIASES)

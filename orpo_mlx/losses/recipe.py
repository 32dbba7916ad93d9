"""What `--method` says: a loss, or a weighted sum of losses, with its hyper-parameters filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.errors import ConfigError, did_you_mean
from orpo_mlx.losses.registry import COMPLETION, LIST, METHODS, PAIR, BoundLoss, Range
from orpo_mlx.types import Example, Wanted

# TRL's name.
ALIASES = {"sigmoid": "dpo"}

NOTATION = (
    "_w: chosen, _l: rejected. s: log π summed over completion tokens; m = s/|y|; h = log π - log π_ref; "
    "OR: odds ratio of exp(m). ε: --label-smoothing, β: --beta, γ: --gamma, δ: --delta, α: --alpha, λ: --ld-alpha, "
    "τ: --tau. Of completions and lists: λ_D: --desirable-weight, λ_U: --undesirable-weight, KL: mean h of mismatched "
    "completions; the best first, ψ: scores."
)

PARAMETERS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.parameters))
"""Every hyper-parameter that some loss has."""

# weight * name, or a name alone; weights as Python writes floats.
_TERM = re.compile(r"\s*(?:([0-9.eE-]+)\s*\*\s*)?([a-z_]+)\s*")


class Term(NamedTuple):
    """A summand of a method."""

    weight: float
    name: str
    """A key of `METHODS`."""


class Recipe(NamedTuple):
    """A loss, or a weighted sum of losses, with its parameters filled in."""

    expression: str
    loss: BoundLoss
    parameters: dict[str, dict[str, float]]
    """Parameters of each term, by its name."""
    needs_reference: bool
    couples_pairs: bool
    wanted: Wanted
    """What its terms read besides summed log-probs."""
    takes_weights: bool
    """Whether each of its losses is one pair's, which a weight can multiply."""
    margin_scale: float
    """Loss margin per point of score."""
    one_sided: bool
    """Whether its terms look at the chosen side alone, so that rows of one completion are enough."""
    unit: str
    """What its terms are losses of, see `registry.Method`."""

    def count(self, examples: Sequence[Example]) -> int:
        """Pairs, completions or lists in some examples: what their loss is the mean over."""
        counts = {PAIR: lambda each: len(each.pairs), COMPLETION: lambda each: len(each.completions), LIST: lambda _: 1}
        return sum(map(counts[self.unit], examples))


def parse_terms(expression: str) -> list[Term]:
    """The terms of `name`, or of `weight*name + name + ...`.

    Raises:
        ConfigError: not such an expression, or an unknown name.
    """
    terms = []
    for part in expression.split("+"):
        match = _TERM.fullmatch(part)
        try:
            weight = float(match[1] or 1.0) if match else 0.0
        # `1e` and `..` fit the pattern, too.
        except ValueError:
            weight = 0.0
        if match is None or not 0 < weight < float("inf"):
            raise ConfigError(
                f"`method` {expression}: cannot read the term {part.strip()!r}; expected a method's name, or a sum "
                "such as '0.8*sigmoid + 0.2*bco_pair + sft' with weights above 0."
            )
        name = ALIASES.get(match[2], match[2])
        if name not in METHODS:
            hint = did_you_mean(name, [*METHODS, *ALIASES])
            raise ConfigError(
                f"`method` {expression}: no method {match[2]!r}, expected one of {', '.join(METHODS)}{hint}"
            )
        terms.append(Term(weight, name))
    # Parameters are kept by method, so a second term of one could not have its own.
    if len({term.name for term in terms}) < len(terms):
        raise ConfigError(f"`method` {expression}: a method stands in the sum twice; give it one weight.")
    return terms


def make_recipe(expression: str, given: Mapping[str, float | None], margin_scale: float = 0.0) -> Recipe:
    """The loss or sum with its parameters: each term's defaults, overridden in every term that has a given one.

    The rewards and log-probs of a sum, which are only logged, are its first term's.

    Raises:
        ConfigError: an unknown method, a parameter no term has, or one out of its range; a margin for none of them.
    """
    terms = parse_terms(expression)
    chosen = {name: value for name, value in given.items() if value is not None}
    methods = [METHODS[term.name] for term in terms]
    if margin_scale > 0 and not any(method.takes_margin for method in methods):
        having = ", ".join(name for name, method in METHODS.items() if method.takes_margin)
        raise ConfigError(f"`margin_scale`: method {expression} has no margin; leave it out, or take one of {having}.")
    _check_parameters(expression, terms, chosen)
    units = {method.unit: term.name for term, method in zip(terms, methods, strict=True)}
    if len(units) > 1:
        kinds = " and ".join(f"{name} is a loss of a {unit}" for unit, name in units.items())
        raise ConfigError(f"`method` {expression}: {kinds}, so they cannot be added; sum losses of one kind.")
    parameters = {
        term.name: {**method.defaults, **{key: chosen[key] for key in method.parameters if key in chosen}}
        for term, method in zip(terms, methods, strict=True)
    }

    def loss(logps: Any) -> Any:
        outputs = [METHODS[name].loss(logps, **parameters[name]) for _, name in terms]
        total = terms[0].weight * outputs[0].losses
        for term, output in zip(terms[1:], outputs[1:], strict=True):
            total = total + term.weight * output.losses
        # A weight belongs to a row, whatever is made of it: here once, and in no loss.
        if logps.weight is None:
            return outputs[0]._replace(losses=total)
        # (B,), and losses of completions are (B, K).
        weight = logps.weight[:, None] if total.ndim == 2 else logps.weight
        return outputs[0]._replace(losses=weight * total)

    return Recipe(
        expression,
        loss,
        parameters,
        any(method.needs_reference for method in methods),
        any(method.couples_pairs for method in methods),
        Wanted(*(any(wishes) for wishes in zip(*(method.wanted for method in methods), strict=True))),
        all(method.takes_weights for method in methods),
        margin_scale,
        all(method.one_sided for method in methods),
        methods[0].unit,
    )


def _check_parameters(expression: str, terms: Sequence[Term], chosen: Mapping[str, float]) -> None:
    """Every given parameter is one that a term has, and in the range of every term that has it."""
    ranges: dict[str, list[Range]] = {}
    for term in terms:
        for name, parameter in METHODS[term.name].parameters.items():
            ranges.setdefault(name, []).append(parameter.range)
    for name, value in chosen.items():
        if name not in ranges:
            known = ", ".join(f"`{each}`" for each in sorted(ranges)) or "no parameters"
            raise ConfigError(f"`{name}`: method {expression} has no such parameter; it has {known}.")
        for text, holds in ranges[name]:
            if not holds(value):
                raise ConfigError(f"`{name}`: found {value:g}, expected a number {text}.")


def describe_methods() -> str:
    """All methods, one after another, for `--list-methods`."""
    lines = []
    for name, method in METHODS.items():
        parameters = ", ".join(f"{key}={value:g}" for key, value in method.defaults.items()) or "none"
        reference = "needed" if method.needs_reference else "not needed"
        lines += [
            name,
            f"  loss of a   {method.unit}",
            f"  loss        {method.equation}",
            f"  reference   {reference}",
            f"  parameters  {parameters}",
        ]
        lines += [f"  paper       {method.source}", ""]
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    return "\n".join([*lines, NOTATION, f"Sums: --method '0.8*sigmoid + 0.2*bco_pair + sft' ({aliases})."])

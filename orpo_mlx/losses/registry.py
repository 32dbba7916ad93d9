"""The registry: a method is a loss, what it needs, and its hyper-parameters. Weighted sums of methods are methods.

Adding one takes a function in `preference.py`, a line here and a row in `tests/losses/test_preference.py`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from orpo_mlx import losses
from orpo_mlx.errors import ConfigError
from orpo_mlx.types import LossOutput, PairLogProbs

Loss = Callable[..., LossOutput]
BoundLoss = Callable[[PairLogProbs], LossOutput]
Parameters = dict[str, float]


class Method(NamedTuple):
    """One way to learn from pairs."""

    loss: Loss
    """`loss(logps, **parameters) -> LossOutput`."""
    needs_reference: bool
    equation: str
    source: str
    couples_pairs: bool = False
    """Whether a pair's loss depends on the other pairs of its batch."""

    @property
    def defaults(self) -> Parameters:
        """The loss's keyword-only parameters and their default values."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


_Z = "z = β(h_w - h_l)"

METHODS: dict[str, Method] = {
    "orpo": Method(losses.orpo, False, "NLL_w - β log σ(log OR)", "Hong et al. 2024, arXiv:2403.07691"),
    "orpo_style": Method(losses.orpo_style, False, "-log σ(log OR) + β(m_l - m_w)", "course chapter on ORPO"),
    "simpo": Method(losses.simpo, False, "-log σ(β(m_w - m_l) - γ)", "Meng et al. 2024, arXiv:2405.14734"),
    "cpo": Method(losses.cpo, False, "-log σ(β(s_w - s_l)) + α NLL_w", "Xu et al. 2024, arXiv:2401.08417"),
    "rrhf": Method(losses.rrhf, False, "max(0, m_l - m_w) - α s_w", "Yuan et al. 2023, arXiv:2304.05302"),
    "slic": Method(losses.slic, False, "max(0, δ - s_w + s_l) - α s_w", "Zhao et al. 2023, arXiv:2305.10425"),
    "sft": Method(losses.sft, False, "NLL_w", "maximum likelihood"),
    "dpo": Method(losses.dpo, True, f"-(1-ε) log σ(z) - ε log σ(-z), {_Z}", "Rafailov et al. 2023, arXiv:2305.18290"),
    "sigmoid_norm": Method(
        losses.sigmoid_norm, True, "-log σ(β(h_w/|y_w| - h_l/|y_l|))", "Lambert et al. 2024, arXiv:2411.15124"
    ),
    "hinge": Method(losses.hinge, True, f"max(0, 1 - z), {_Z}", "Liu et al. 2023, arXiv:2309.06657"),
    "ipo": Method(losses.ipo, True, "(h_w/|y_w| - h_l/|y_l| - 1/(2β))²", "Azar et al. 2023, arXiv:2310.12036"),
    "robust": Method(
        losses.robust, True, f"(ε log σ(-z) - (1-ε) log σ(z))/(1 - 2ε), {_Z}", "Chowdhury et al. 2024, arXiv:2403.00409"
    ),
    "exo_pair": Method(losses.exo_pair, True, f"KL(σ(±z) ‖ (1-ε, ε)), {_Z}", "Ji et al. 2024, arXiv:2402.00856"),
    "nca_pair": Method(
        losses.nca_pair, True, "-log σ(βh_w) - ½ log σ(-βh_w) - ½ log σ(-βh_l)", "Chen et al. 2024, arXiv:2402.05369"
    ),
    "bco_pair": Method(
        losses.bco_pair, True, "-log σ(βh_w - δ) - log σ(δ - βh_l)", "Jung et al. 2024, arXiv:2404.04656"
    ),
    "sppo_hard": Method(
        losses.sppo_hard, True, "(h_w - 1/(2β))² + (h_l + 1/(2β))²", "Wu et al. 2024, arXiv:2405.00675"
    ),
    "aot": Method(
        losses.aot, True, "dpo, z = β(sort(s_w - s_l) - sort(ref))", "Melnyk et al. 2024, arXiv:2406.05882", True
    ),
    "aot_unpaired": Method(
        losses.aot_unpaired, True, "dpo, z = β(sort(h_w) - sort(h_l))", "Melnyk et al. 2024, arXiv:2406.05882", True
    ),
    "apo_zero": Method(losses.apo_zero, True, "1 - σ(βh_w) + σ(βh_l)", "D'Oosterlinck et al. 2024, arXiv:2408.06266"),
    "apo_down": Method(
        losses.apo_down, True, f"σ(βh_w) + 1 - σ(z), {_Z}", "D'Oosterlinck et al. 2024, arXiv:2408.06266"
    ),
    "discopop": Method(
        losses.discopop, True, f"-σ(-z/τ) log σ(z) + σ(z/τ) e⁻ᶻ, {_Z}", "Lu et al. 2024, arXiv:2406.08414"
    ),
    "dpop": Method(losses.dpop, True, "-log σ(β(h_w - h_l - δ max(0, -h_w)))", "Pal et al. 2024, arXiv:2402.13228"),
}

ALIASES = {"sigmoid": "dpo"}

NOTATION = (
    "_w: chosen, _l: rejected. s: log π summed over completion tokens; m = s/|y|; h = log π - log π_ref; "
    "OR: odds ratio of exp(m). ε: --label-smoothing, β: --beta, γ: --gamma, δ: --delta, α: --alpha, τ: --tau."
)

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("above 0", lambda value: value > 0),
    "gamma": ("0 or more", lambda value: value >= 0),
    "alpha": ("0 or more", lambda value: value >= 0),
    "delta": ("0 or more", lambda value: value >= 0),
    "tau": ("above 0 and below 1", lambda value: 0 < value < 1),
    "label_smoothing": ("0 or more and below 0.5", lambda value: 0 <= value < 0.5),
}

PARAMETERS = tuple(_RANGES)
"""Every hyper-parameter that some method has."""

_TERM = re.compile(r"\s*(?:([0-9.eE-]+)\s*\*\s*)?([a-z_]+)\s*")


class Recipe(NamedTuple):
    """A method, or a weighted sum of methods, with its parameters filled in."""

    expression: str
    loss: BoundLoss
    parameters: dict[str, Parameters]
    """Parameters of each term, by method name."""
    needs_reference: bool
    couples_pairs: bool


def parse(expression: str) -> list[tuple[float, str]]:
    """Weights and names of `name`, or of `weight*name + name + ...`.

    Raises:
        ConfigError: not such an expression, or an unknown name.
    """
    terms = []
    for part in expression.split("+"):
        match = _TERM.fullmatch(part)
        try:
            weight = float(match[1] or 1.0) if match else 0.0
        except ValueError:
            weight = 0.0
        if match is None or not 0 < weight < float("inf"):
            raise ConfigError(
                f"--method {expression}: cannot read the term {part.strip()!r}; expected a method's name, or a sum "
                "such as '0.8*sigmoid + 0.2*bco_pair + sft' with weights above 0."
            )
        name = ALIASES.get(match[2], match[2])
        if name not in METHODS:
            near = difflib.get_close_matches(name, [*METHODS, *ALIASES], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(
                f"--method {expression}: no method {match[2]!r}, expected one of {', '.join(METHODS)}{hint}"
            )
        terms.append((weight, name))
    names = [name for _, name in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"--method {expression}: a method stands in the sum twice; give it one weight.")
    return terms


def resolve(expression: str, given: Mapping[str, float | None]) -> Recipe:
    """The method or sum with its parameters: each term's defaults, overridden in every term that has a given one.

    The rewards and log-probs of a sum, which are only logged, are its first term's.

    Raises:
        ConfigError: an unknown method, a parameter no term has, or one out of its range.
    """
    terms = parse(expression)
    chosen = {name: value for name, value in given.items() if value is not None}
    have = sorted({parameter for _, name in terms for parameter in METHODS[name].defaults})
    for parameter, value in chosen.items():
        flag = f"--{parameter.replace('_', '-')}"
        if parameter not in have:
            known = ", ".join(f"--{each.replace('_', '-')}" for each in have) or "no parameters"
            raise ConfigError(f"{flag}: method {expression} has no such parameter; it has {known}.")
        words, holds = _RANGES[parameter]
        if not holds(value):
            raise ConfigError(f"{flag}: found {value:g}, expected a number {words}.")
    parameters = {}
    for _, name in terms:
        defaults = METHODS[name].defaults
        parameters[name] = {**defaults, **{key: value for key, value in chosen.items() if key in defaults}}
    if parameters.get("exo_pair", {}).get("label_smoothing") == 0:
        raise ConfigError(
            "--label-smoothing: found 0, expected a number above 0 for exo_pair, whose loss has log ε in it."
        )

    def loss(logps: PairLogProbs) -> LossOutput:
        outputs = [METHODS[name].loss(logps, **parameters[name]) for _, name in terms]
        total = terms[0][0] * outputs[0].losses
        for (weight, _), output in zip(terms[1:], outputs[1:], strict=True):
            total = total + weight * output.losses
        return outputs[0]._replace(losses=total)

    used = [METHODS[name] for _, name in terms]
    return Recipe(
        expression,
        loss,
        parameters,
        any(method.needs_reference for method in used),
        any(method.couples_pairs for method in used),
    )


def describe() -> str:
    """All methods, one after another, for `--list-methods`."""
    lines = []
    for name, method in METHODS.items():
        parameters = ", ".join(f"{key}={value:g}" for key, value in method.defaults.items()) or "none"
        reference = "needed" if method.needs_reference else "not needed"
        lines += [name, f"  loss        {method.equation}", f"  reference   {reference}", f"  parameters  {parameters}"]
        lines += [f"  paper       {method.source}", ""]
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    return "\n".join([*lines, NOTATION, f"Sums: --method '0.8*sigmoid + 0.2*bco_pair + sft' ({aliases})."])

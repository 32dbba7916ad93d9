"""Tables of the losses, from their cards in the code."""

from __future__ import annotations

from orpo_mlx.losses.recipe import PARAMETERS
from orpo_mlx.losses.registry import METHODS


def methods_table() -> str:
    """The losses by their cards."""
    rows = ["| `--method` | loss | of a | reference model | source |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        equation = method.equation.replace("|", r"\|")
        reference = "yes" if method.needs_reference else "no"
        rows.append(f"| `{name}` | {equation} | {method.unit} | {reference} | {method.source} |")
    return "\n".join(rows)


def parameters_table() -> str:
    """The losses' hyper-parameters: the values each takes, and the losses that have it with their defaults."""
    rows = ["| flag | values | methods and their defaults |", "|---|---|---|"]
    for parameter in PARAMETERS:
        having: dict[str, list[str]] = {}
        for name, method in METHODS.items():
            if parameter in method.parameters:
                default, values = method.parameters[parameter]
                having.setdefault(values.text, []).append(f"`{name}` {default:g}")
        flag = f"`--{parameter.replace('_', '-')}`"
        rows += [f"| {flag} | {text} | {', '.join(methods)} |" for text, methods in having.items()]
    return "\n".join(rows)


def methods_with_margins() -> str:
    """The methods that heed `--margin-scale`."""
    return ", ".join(f"`{name}`" for name, method in METHODS.items() if method.takes_margin) + "."


FROM_CODE = {"margins": methods_with_margins, "methods": methods_table, "parameters": parameters_table}

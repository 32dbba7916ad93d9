"""What PEFT's adapter_config.json says, in the few numbers that mlx-lm's adapters have, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.errors import ModelError
from orpo_mlx.text import printable

# Keys that are read here, or say how the adapter was made; every other must be at rest (null, false, empty).
_HARMLESS = """
auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out inference_mode
init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config
megatron_core peft_type peft_version qalora_group_size r revision runtime_config target_modules task_type use_dora
use_rslora alpha_pattern rank_pattern modules_to_save
"""
# Ways to initialise that leave the base model's weights as they are; the others adapt a changed base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Scaling(NamedTuple):
    """An adapter's numbers."""

    rank: int
    scale: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA: what B A x is multiplied with."""
    dropout: float
    dora: bool


def read_scaling(config: Mapping[str, Any], location: str, modules: Iterable[str] = ()) -> Scaling:
    """The numbers of a PEFT config.

    Args:
        config: PEFT's adapter_config.json.
        location: of the file, for errors.
        modules: full names of the adapted modules, as PEFT has them: patterns of ranks and alphas are taken where all
            of these come out alike.

    Raises:
        ModelError: it is not LoRA's, is damaged, or says something mlx-lm's adapters cannot express.
    """
    # Before PEFT said its kind, there was one.
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"{location}: peft_type is {config.get('peft_type')!r}, and only 'LORA' can be converted.")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    dropout: Any = config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1 or not is_number(alpha) or not is_number(dropout):
        raise ModelError(
            f"{location}: r, lora_alpha and lora_dropout are {rank!r}, {alpha!r} and {dropout!r}, not numbers."
        )
    refuse_inexpressible(config, location)
    rank, scale = _common_scale(config, rank, alpha, sorted(modules), location)
    return Scaling(rank, scale, float(dropout), bool(config.get("use_dora")))


def _common_scale(
    config: Mapping[str, Any], rank: int, alpha: float, modules: Sequence[str], location: str
) -> tuple[int, float]:
    """The rank and scale that all modules have, of the common ones and those of patterns."""
    found: dict[tuple[int, float], str] = {}
    for name in modules or [""]:
        own_rank = _by_pattern(config.get("rank_pattern"), name, rank, location)
        own_alpha = _by_pattern(config.get("alpha_pattern"), name, alpha, location)
        root = math.sqrt(own_rank) if config.get("use_rslora") else own_rank
        found.setdefault((own_rank, own_alpha / root), name)
    if len(found) > 1 or (not modules and (config.get("rank_pattern") or config.get("alpha_pattern"))):
        patterns = {key: config[key] for key in ("rank_pattern", "alpha_pattern") if config.get(key)}
        shown = printable(str(patterns))[:120]
        raise ModelError(
            f"{location}: {shown} makes layers differ, and mlx-lm's adapters have one rank and one scale; merge it "
            "with PEFT, or train it with one of each."
        )
    (pair,) = found
    return pair


def _by_pattern(patterns: Any, module: str, common: Any, location: str) -> Any:
    """A module's number: of the first pattern that its name ends in, as PEFT looks it up."""
    try:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                if not is_number(value) or value <= 0:
                    raise ValueError(f"{value!r} is no number above 0")
                return value
    except (re.error, AttributeError, ValueError) as error:
        raise ModelError(f"{location}: rank_pattern or alpha_pattern cannot be read ({error}).") from None
    return common


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number; true and false are none."""
    return type(value) in (int, float) and math.isfinite(value)


def refuse_inexpressible(config: Mapping[str, Any], location: str) -> None:
    """Make sure that a PEFT config says nothing that mlx-lm's adapters cannot, as far as it shows without the tensors.

    Raises:
        ModelError: it does.
    """
    for key, value in config.items():
        if key not in _HARMLESS.split() and value not in (None, False) and value != {} and value != []:
            shown = printable(repr(value))[:80]
            advice = "; merge it with PEFT" if key in ("lora_bias", "layer_replication", "target_parameters") else ""
            raise ModelError(f"{location}: {key} ({shown}) cannot be expressed by mlx-lm's adapters{advice}.")
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{location}: bias is {config['bias']!r}: trained biases cannot be expressed by mlx-lm's adapters."
        )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ModelError(
            f"{location}: init_lora_weights is {start!r}, which changes the base model's weights; convert the adapter "
            "to plain LoRA with PEFT first (path_initial_model_for_weight_conversion)."
        )


def make_peft_config(scaling: Scaling, targets: Mapping[str, Any], base: str) -> dict[str, Any]:
    """A PEFT config for an adapter that mlx-lm's trainer made.

    Args:
        scaling: its numbers.
        targets: `target_modules` and, where need be, `layers_to_transform`; see `find_targets`.
        base: the name of the base model.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": scaling.rank,
        "lora_alpha": alpha_for(scaling),
        "lora_dropout": scaling.dropout,
        "bias": "none",
        "use_dora": scaling.dora,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **targets,
    }


def alpha_for(scaling: Scaling) -> float | int:
    """The alpha for which alpha / r is the scale: to the last bit, or next to it where no float gives the very one."""
    # The product is rounded, and dividing it by the rank again need not give the scale back.
    near = scaling.scale * scaling.rank
    around = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    alpha = min(around, key=lambda each: abs(each / scaling.rank - scaling.scale))
    return int(alpha) if alpha == int(alpha) else alpha


def same_scaling(one: Scaling, other: Scaling) -> bool:
    """Whether two adapters have the same numbers, scales to the last bit but one."""
    # 4e-16 is two units in the last place: alpha / r is rounded once on either side.
    return one._replace(scale=0) == other._replace(scale=0) and math.isclose(one.scale, other.scale, rel_tol=4e-16)


def find_targets(adapted: set[str], leaves: Sequence[str]) -> dict[str, Any]:
    """The shortest `target_modules` that PEFT matches with exactly the modules in `adapted`.

    Args:
        adapted: full names.
        leaves: full names of the model's modules that PEFT could put an adapter on by a shared ending.
    """
    endings = sorted({name.rpartition(".")[2] for name in adapted})
    inner = sorted({name_in_layer(name) for name in adapted})
    layers = sorted({int(index) for name in adapted if (index := layer_index(name)) is not None})
    # Short endings first, as people write them; layers are named only where not all are adapted.
    for targets in (endings, inner):
        for config in ({"target_modules": targets}, {"target_modules": targets, "layers_to_transform": layers}):
            if {name for name in leaves if matches(config, name)} == adapted:
                return config
    return {"target_modules": sorted(adapted)}


def matches(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT puts an adapter on the module `name`, by `target_modules` and `layers_to_transform`."""
    targets = config["target_modules"]
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    if not any(name.endswith(f".{target}") for target in targets):
        return False
    layers = config.get("layers_to_transform")
    return not layers or layer_index(name) in [str(layer) for layer in ([layers] if type(layers) is int else layers)]


def layer_index(name: str) -> str | None:
    """The number of a module's layer as PEFT finds it: the first in its name, after at least two parts."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return found[1] if found else None


def name_in_layer(name: str) -> str:
    """What follows that number; the whole name where there is none."""
    found = re.match(r".*?\.[^.]*\.\d+\.(.+)", name)
    return found[1] if found else name

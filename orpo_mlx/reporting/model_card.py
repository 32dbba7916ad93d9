"""The model card of a run: `README.md` in its adapter folder, written once training is done."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from markupsafe import Markup

from orpo_mlx.errors import DataError
from orpo_mlx.files import write_text
from orpo_mlx.losses.recipe import NOTATION, Term, parse_terms
from orpo_mlx.losses.registry import METHODS
from orpo_mlx.reporting.console import CLOSING_ROWS, shown_metric
from orpo_mlx.reporting.html_page import render_markdown
from orpo_mlx.reporting.metrics_log import read_run
from orpo_mlx.run_folder import CARD_FILE, RUN_FILE
from orpo_mlx.text import printable, shareable

# A card carries its own hash, which tells whether somebody has changed it since.
_MARK = "<!-- Written by orpo_mlx. A card whose text no longer has this SHA-256 is never overwritten: {} -->\n"
_MARKED = re.compile(re.escape(_MARK.strip()).replace(r"\{\}", "([0-9a-f]{64})"))
_KINDS = {"lora": "LoRA adapters", "dora": "DoRA adapters", "full": "Fully fine-tuned weights"}

MeansBySplit = Mapping[str, Mapping[str, float]]
"""Means over evaluated pairs, by split, then by metric."""
Settings = Mapping[str, Any]
PickSettings = Callable[[Settings], Settings]
"""From all settings to those that have a row in the card."""


def write_card(folder: Path, before: MeansBySplit, after: MeansBySplit, listed: PickSettings) -> bool:
    """Write the card of the run in `folder`, from its `run.json` and `metrics.jsonl` and its evaluation metrics;
    `listed` picks the settings that have a row.

    Returns:
        Whether it was written: a README.md that is not this package's, or was changed since, is left as it is.

    Raises:
        OSError: a file cannot be read or written.
    """
    path = folder / CARD_FILE
    if path.exists() and not _is_untouched(path.read_bytes()):
        return False
    record = shareable(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
    text = card_text(record, before, after, _peak_gib(folder), listed)
    write_text(path, text + _MARK.format(hashlib.sha256(text.encode()).hexdigest()))
    return True


def card_text(
    record: Mapping[str, Any], before: MeansBySplit, after: MeansBySplit, peak_gib: float | None, listed: PickSettings
) -> str:
    """The card as Markdown below a YAML header.

    Args:
        record: what `run.json` holds, without local paths.
        before: evaluation metrics before training, by split.
        after: the same after training.
        peak_gib: MLX's peak while training; None where no step was reported.
        listed: picks the settings that have a row.
    """
    settings = record["settings"]
    return render_markdown(
        "reporting/model_card.md.jinja",
        header=Markup(card_header(settings).to_yaml()),
        name=last_part(settings["model"]),
        kind=_KINDS[settings["fine_tune_type"]],
        settings=settings,
        quoted_model=Markup(printable(shlex.quote(settings["model"]))),
        terms=[method_term(term, record["method_parameters"]) for term in parse_terms(settings["method"])],
        notation=NOTATION,
        data={split: {**facts, "name": last_part(facts["path"])} for split, facts in record["data"].items()},
        splits=[split for split in before if split in after],
        closing_rows=CLOSING_ROWS,
        shown_metric=shown_metric,
        before=before,
        after=after,
        shown={name: json.dumps(value, ensure_ascii=False) for name, value in listed(settings).items()},
        trainable_parameters=record["trainable_parameters"],
        peak_gib=peak_gib,
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )


def card_header(settings: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads of a card."""
    data = re.split("[:@]", settings["data"])[0]
    return ModelCardData(
        base_model=settings["model"] if _is_hub_id(settings["model"]) else None,
        base_model_relation="finetune" if settings["fine_tune_type"] == "full" else "adapter",
        datasets=[data] if _is_hub_id(data) else None,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "orpo-mlx", "preference-alignment", *(name for _, name in parse_terms(settings["method"]))],
    )


def method_term(term: Term, parameters: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """One summand of the method as the card's table has it."""
    method = METHODS[term.name]
    shown = ", ".join(f"{key} {value:g}" for key, value in parameters[term.name].items())
    return {
        "name": term.name,
        "weight": f"{term.weight:g}",
        "equation": method.equation,
        "parameters": shown or "none",
        "source": method.source,
    }


def last_part(path: str) -> str:
    """The last part of a path, or all of what has no parts."""
    return PurePath(path).name or path


def _is_untouched(content: bytes) -> bool:
    text, _, last = content.decode("utf-8", errors="replace").rstrip("\n").rpartition("\n")
    found = _MARKED.fullmatch(last)
    return found is not None and hashlib.sha256(f"{text}\n".encode()).hexdigest() == found[1]


def has_hub_form(name: str) -> bool:
    """Whether `name` has the form of a repository of the Hub with its owner."""
    if name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_hub_id(name: str) -> bool:
    # A local folder goes before a repository of the same name, as it does where models and data are read.
    return has_hub_form(name) and not Path(name).exists()


def _peak_gib(folder: Path) -> float | None:
    try:
        points = read_run(folder).points("train", "peak_memory_gib")
    except DataError:  # A run so short that it has reported nothing.
        return None
    return max((value for _, value in points), default=None)

"""The model card of a run: `README.md` in its adapter folder, written once training is done."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from orpo_mlx.errors import DataError
from orpo_mlx.files import write_text
from orpo_mlx.losses.recipe import NOTATION, parse_terms
from orpo_mlx.losses.registry import METHODS
from orpo_mlx.reporting.console import CLOSING_ROWS
from orpo_mlx.reporting.html_page import markdown_text
from orpo_mlx.reporting.metrics_log import read_run
from orpo_mlx.text import printable

FILE = "README.md"

_MARK = "<!-- Written by orpo_mlx. A card whose text no longer has this SHA-256 is never overwritten: {} -->\n"
_MARKED = re.compile(re.escape(_MARK.strip()).replace(r"\{\}", "([0-9a-f]{64})"))

Held = Mapping[str, Mapping[str, float]]
"""Metrics by split."""
Settings = Mapping[str, Any]


def write_card(folder: Path, before: Held, after: Held, listed: Callable[[Settings], Settings]) -> bool:
    """Write the card of the run in `folder`, from its `run.json` and `metrics.jsonl` and its held-out metrics;
    `listed` picks the settings that have a row.

    Returns:
        Whether it was written: a README.md that is not this package's, or was changed since, is left as it is.

    Raises:
        OSError: a file cannot be read or written.
    """
    path = folder / FILE
    if path.exists() and not _is_untouched(path.read_bytes()):
        return False
    record = shareable(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    text = card_text(record, before, after, _peak_gib(folder), listed)
    write_text(path, text + _MARK.format(hashlib.sha256(text.encode()).hexdigest()))
    return True


def card_text(
    record: Mapping[str, Any],
    before: Held,
    after: Held,
    peak_gib: float | None,
    listed: Callable[[Settings], Settings],
) -> str:
    """The card as Markdown below a YAML header.

    Args:
        record: what `run.json` holds, without local paths.
        before: held-out metrics before training, by split.
        after: the same after training.
        peak_gib: MLX's peak while training; None where no step was reported.
        listed: from all settings to those that have a row.
    """
    settings = record["settings"]
    parts = [
        f"---\n{_header(settings).to_yaml()}\n---\n",
        f"# {markdown_text(PurePath(settings['model']).name)}, aligned with {markdown_text(settings['method'])}\n",
        f"{_kind(settings)} for {_code(settings['model'])}, trained on pairs of a chosen and a rejected answer with "
        "[MLX](https://github.com/ml-explore/mlx) by orpo_mlx.\n",
        _usage(settings),
        _method(record),
        _data(record["data"]),
        _figures(before, after),
        _settings(record, peak_gib, listed),
    ]
    return "\n".join(parts) + "\n"


def shareable(value: Any) -> Any:
    """A JSON value whose local paths are cut down to their last part: what they lie below is nobody's business."""
    if isinstance(value, Mapping):
        return {key: shareable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shareable(each) for each in value]
    return ", ".join(map(_last_part, value.split(", "))) if isinstance(value, str) else value


def _last_part(word: str) -> str:
    is_path = word.startswith(("/", "~", "./", "../")) or PurePath(word).is_absolute() or "\\" in word
    return re.split(r"[/\\]", word.rstrip("/\\"))[-1] if is_path else word


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


def _header(settings: Mapping[str, Any]) -> ModelCardData:
    model, data = settings["model"], re.split("[:@]", settings["data"])[0]
    methods = [name for _, name in parse_terms(settings["method"])]
    return ModelCardData(
        base_model=model if _is_hub_id(model) else None,
        base_model_relation="finetune" if settings["fine_tune_type"] == "full" else "adapter",
        datasets=[data] if _is_hub_id(data) else None,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "orpo-mlx", "preference-alignment", *methods],
    )


def _kind(settings: Mapping[str, Any]) -> str:
    names = {"lora": "LoRA adapters", "dora": "DoRA adapters", "full": "Fully fine-tuned weights"}
    return names[settings["fine_tune_type"]]


def _usage(settings: Mapping[str, Any]) -> str:
    model = printable(shlex.quote(settings["model"]))
    return (
        "## Use\n\nWith this folder as `adapters`:\n\n```sh\n"
        f'python -m mlx_lm generate --model {model} --adapter-path adapters --prompt "..."\n'
        f"orpo-mlx chat --model {model} --adapter-path adapters\n```\n"
    )


def _method(record: Mapping[str, Any]) -> str:
    rows = []
    for weight, name in parse_terms(record["settings"]["method"]):
        parameters = ", ".join(f"{key} {value:g}" for key, value in record["method_parameters"][name].items())
        method = METHODS[name]
        cells = (_code(name), f"{weight:g}", method.equation, parameters or "none", method.source)
        rows.append([cells[0], *map(markdown_text, cells[1:])])
    table = _table(("method", "weight", "loss", "parameters", "source"), rows)
    return f"## Method\n\n{table}\n{markdown_text(NOTATION)}\n"


def _data(splits: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            *map(markdown_text, (name, PurePath(split["path"]).name or split["path"])),
            *(f"{split[key]:,}" for key in ("rows", "pairs")),
            _code(split["sha256"]) if split["sha256"] else "",
        ]
        for name, split in splits.items()
    ]
    return f"## Data\n\n{_table(('split', 'name', 'rows', 'pairs', 'SHA-256'), rows)}"


def _figures(before: Held, after: Held) -> str:
    splits = [split for split in before if split in after]
    if not splits:
        return "## Figures\n\nNo held-out pairs were measured before and after training.\n"
    heads = ["", *(f"{split} {when}" for split in splits for when in ("before", "after"))]
    rows = [
        [title, *(form.format(side[split][key]) for split in splits for side in (before, after))]
        for title, (key, form) in CLOSING_ROWS.items()
    ]
    return f"## Figures\n\nOn held-out pairs, before and after training:\n\n{_table(heads, rows)}"


def _settings(record: Mapping[str, Any], peak_gib: float | None, listed: Callable[[Settings], Settings]) -> str:
    shown = listed(record["settings"]).items()
    rows = [[_code(name), markdown_text(json.dumps(value, ensure_ascii=False))] for name, value in shown]
    rows.append(["trainable parameters", f"{record['trainable_parameters']:,}"])
    if peak_gib is not None:
        rows.append(["peak memory while training (MLX)", f"{peak_gib:.2f} GiB"])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"## Settings\n\n{_table(('setting', 'value'), rows)}\nSettings that are not listed have their defaults. "
        f"Versions: {markdown_text(versions)}.\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(words: str) -> str:
    # A backtick would end the code span, a bar the table's cell.
    return f"`{printable(words)}`" if not set(words) & set("`|") else markdown_text(words)


def _peak_gib(folder: Path) -> float | None:
    try:
        points = read_run(folder).points("train", "peak_memory_gib")
    except DataError:  # A run so short that it has reported nothing.
        return None
    return max((value for _, value in points), default=None)

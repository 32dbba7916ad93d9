"""What every conversion has in common: its settings, the model written, the result compared with what it came from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from orpo_mlx.convert.open_checkpoint import Base
from orpo_mlx.convert.peft_adapters import Adapter
from orpo_mlx.convert.quantize import Quantisation, cast, quantise
from orpo_mlx.convert.verify import (
    EXACT,
    MERGED,
    REPORTED,
    ROUNDED,
    Limit,
    Logps,
    compare,
    demand,
    folder_logps,
    has_torch,
    model_logps,
    probe_pairs,
    transformers_logps,
)
from orpo_mlx.convert.write_model import take_weights, write_json, write_weights
from orpo_mlx.engine.score import add_trained_adapters
from orpo_mlx.errors import ModelError
from orpo_mlx.models.loading import DTYPES, ModelHead, load
from orpo_mlx.types import TokenizedPair

SCRATCH = ".source"
"""A folder within the one that is written, for what is needed meanwhile."""


class Task(NamedTuple):
    """What was asked for, whatever the kind of conversion."""

    destination: Path
    overwrite: bool
    verify: bool
    trust_remote_code: bool
    dtype: str | None = None
    how: Quantisation | None = None


class Check(NamedTuple):
    """What a written model is compared with."""

    pairs: list[TokenizedPair]
    before: Logps


def check_of(task: Task, head: ModelHead, adapter: Path | None = None) -> Check | None:
    """Log-probs of the model, with an adapter where one is given, before it is converted; None with --no-verify."""
    if not task.verify:
        return None
    pairs = probe_pairs(head.tokenizer, head.config)
    model = load(head, trust_remote_code=task.trust_remote_code).model
    if adapter is not None:
        add_trained_adapters(model, adapter)
    return Check(pairs, model_logps(model, pairs))


def limit_of(task: Task, *, unchanged: Limit = EXACT) -> Limit:
    """How far log-probs may move; `unchanged` holds where neither dtype nor form changes."""
    if task.how is not None:
        return ROUNDED if task.how.bits == 8 else REPORTED
    return unchanged if task.dtype in (None, "float32") else ROUNDED


def write_model(task: Task, folder: Path, model: nn.Module, config: dict[str, Any]) -> int:
    """Cast and quantise as asked, then weights in mlx-lm's layout and config; the bytes of the weights."""
    if task.dtype is not None:
        cast(model, DTYPES[task.dtype])
        config = with_dtype(config, task.dtype)
    if task.how is not None:
        config, left = quantise(model, config, task.how)
        if left:
            names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            print(
                f"{len(left)} layers stay as they are, since {task.how.group_size} does not divide their width: {names}"
            )
    written = write_weights(folder, take_weights(model), task.destination, layout="mlx")
    write_json(folder / "config.json", config)
    return written


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config` that says so."""
    return {**config, **{key: dtype for key in ("dtype", "torch_dtype") if key in config or key == "dtype"}}


def verify_model(task: Task, folder: Path, check: Check | None, limit: Limit, original: Path | None) -> None:
    """Compare what was written with what was read, and with transformers' reading of `original` where torch is there.

    Raises:
        ModelError: they are further apart than `limit`, or what was written cannot be loaded.
    """
    if check is None:
        return
    after = folder_logps(folder, check.pairs, trust_remote_code=task.trust_remote_code)
    _compare(task, "the model as it was", check.before, after, limit)
    if original is None or not has_torch():
        return
    try:
        theirs = transformers_logps(original, check.pairs, trust_remote_code=task.trust_remote_code)
    except ModelError as error:
        print(f"not compared with transformers: {error}")
        return
    _compare(task, "transformers on PyTorch", theirs, after, limit)


def verify_round_trip(task: Task, one: Adapter, back: Adapter) -> None:
    """Make sure that an adapter converted there and back is the same.

    Raises:
        ModelError: it is not.
    """
    for name in {*one.weights, *back.weights}:
        first, second = one.weights.get(name), back.weights.get(name)
        if first is None or second is None or first.dtype != second.dtype or not mx.array_equal(first, second).item():
            raise ModelError(f"{task.destination}: {name} does not come back as it was, so nothing was kept.")
    if one.config != back.config:
        raise ModelError(f"{task.destination}: the settings do not come back as they were, so nothing was kept.")
    print(f"verified: all {len(one.weights)} tensors and the settings come back bit for bit")


def verify_adapter(task: Task, base: Base, mlx_folder: Path, peft_folder: Path) -> None:
    """mlx-lm runs the one form; PEFT, where it is installed, runs the other: their log-probs must be the same.

    Raises:
        ModelError: they are not, or mlx-lm cannot run it.
    """
    pairs = probe_pairs(base.head.tokenizer, base.head.config)
    loaded = load(base.head, trust_remote_code=task.trust_remote_code)
    add_trained_adapters(loaded.model, mlx_folder)
    ours = model_logps(loaded.model, pairs)
    demand(compare(ours, ours), REPORTED, str(task.destination))
    if not has_torch() or importlib.util.find_spec("peft") is None or not base.files:
        return
    try:
        theirs = transformers_logps(base.folder, pairs, adapter=peft_folder, trust_remote_code=task.trust_remote_code)
    except ModelError as error:
        print(f"not compared with PEFT: {error}")
        return
    _compare(task, "PEFT on PyTorch", theirs, ours, MERGED)


def report(task: Task, written: int) -> None:
    """Say what was written."""
    size = f"{written / 1e9:.2f} GB" if written >= 1e8 else f"{written / 1e6:.2f} MB"
    print(f"wrote {task.destination}: {size} of weights")


def _compare(task: Task, what: str, one: Logps, other: Logps, limit: Limit) -> None:
    difference = compare(one, other)
    print(f"compared with {what}: {difference}")
    demand(difference, limit, str(task.destination))

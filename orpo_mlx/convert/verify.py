"""Whether a conversion kept the model: log-probs of built-in texts before and after, in nats per token."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from orpo_mlx.convert.open_checkpoint import SourceModel
from orpo_mlx.convert.task import Task
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.errors import ModelError, reason_of
from orpo_mlx.files import read_json_table
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.loading import ModelInfo, is_float32, load, loaded_dtype
from orpo_mlx.models.names import FLOAT16_IN_FLOAT32
from orpo_mlx.models.peft_adapters import Adapter
from orpo_mlx.models.vocabulary import vocabulary_of
from orpo_mlx.types import TokenizedPair

Logps = np.ndarray[Any, np.dtype[np.float64]]
"""One number for each token of each completion, nats."""

# Words, code, digits and other scripts, since a wrong tokenizer shows in one of them; two lengths each, so that padding
# and the shared prompt are in play.
TEXTS = (
    ("The capital of France is", " Paris, on the river Seine.", " a kind of cheese from the Alps."),
    ("def add(a, b):\n", "    return a + b\n", "    raise ValueError(f'{a!r} < {b!r}')\n"),
    ("In 1969, 2 people walked on the", " Moon: Armstrong and Aldrin.", " 3.14159 beaches of 42 islands."),
    ("Übung macht den", " Meister, sagt man seit 1600.", " Käse 你好 🙂 größer."),
    ("Water boils at 100 degrees", " Celsius at sea level.", " below zero, which nobody expected."),
)
"""Prompt and two completions each."""


class Limit(NamedTuple):
    """How far log-probs may move, nats per token."""

    worst: float = math.inf
    mean: float = math.inf


EXACT = Limit(worst=1e-4)
"""The same numbers in another file."""
MERGED = Limit(worst=1e-3)
"""The same product in another order, float32."""
ROUNDED = Limit(mean=0.1)
"""Weights rounded to half precision or 8 bits."""
REPORTED = Limit()
"""Fewer bits: whatever comes out is reported, as long as it is a number."""


_BAD_SIGN = 0.3
"""Mean difference, nats per token, from which what was reported needs a word: a token's probability is then off by a
third on average, and greedy replies are others."""


class Difference(NamedTuple):
    """How far two sets of log-probs are apart, nats per token."""

    worst: float
    mean: float
    tokens: int

    def __str__(self) -> str:
        return f"worst {self.worst:.2e}, mean {self.mean:.2e} nats per token over {self.tokens} tokens"


def probe_pairs(tokenizer: Any | None, vocabulary: int, config: Mapping[str, Any]) -> list[TokenizedPair]:
    """`TEXTS` as token ids, or fixed ids of the vocabulary where there is no tokenizer."""
    # transformers puts images in the place of some ids, or another id where there is none.
    stated = [value for key, value in config.items() if key.endswith(("_token_id", "_token_index"))]
    # Of ends there may be several.
    special = {one for value in stated for one in (value if isinstance(value, list) else [value])}
    plain = np.array([token for token in range(vocabulary) if token not in special] or [0])
    rng = np.random.default_rng(0)
    pairs = []
    for number, texts in enumerate(TEXTS):
        if tokenizer is None:
            sides = [plain[rng.integers(0, len(plain), 6 + 4 * part)] for part in range(3)]
        else:
            sides = [tokenizer.encode(text, add_special_tokens=part == 0) for part, text in enumerate(texts)]
        # A tokenizer may have more tokens than the embedding has rows.
        prompt, chosen, rejected = (tuple(int(token) % vocabulary for token in side) for side in sides)
        pairs.append(TokenizedPair(prompt, chosen, rejected, f"built-in text {number + 1}"))
    return pairs


def model_logps(model: nn.Module, pairs: Sequence[TokenizedPair]) -> Logps:
    """Log-prob of every completion token."""
    rows = score_pairs(PairScorer(model), pairs, per_token=True)
    return np.array([value for row in rows for side in ("chosen", "rejected") for value in row[f"{side}_token_logps"]])


def folder_logps(folder: Path, pairs: Sequence[TokenizedPair], *, trust_remote_code: bool = False) -> Logps:
    """The same of a folder or file, loaded as `train` and `score` load it.

    Raises:
        ModelError: it cannot be loaded.
    """
    model = load(str(folder), trust_remote_code=trust_remote_code).model
    quantised = [module for _, module in model.named_modules() if "scales" in module]
    if mx.default_device() == mx.Device(mx.cpu) and all("biases" in module for module in quantised):
        dequantize_model(model)  # The same numbers; quantised products are some 20 times slower on a CPU.
    return model_logps(model, pairs)


def has_torch() -> bool:
    """Whether transformers' PyTorch models can be run here."""
    return importlib.util.find_spec("torch") is not None


def transformers_logps(
    folder: Path, pairs: Sequence[TokenizedPair], *, adapter: Path | None = None, trust_remote_code: bool = False
) -> Logps:
    """The same by transformers on PyTorch in float32, with a PEFT adapter where one is given.

    Raises:
        ModelError: transformers cannot load or run it.
    """
    # By name: neither torch nor peft is a dependency, and mypy need not find them.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    try:
        # The class it was saved from: for a vision-language model, AutoModelForCausalLM has none, or another one.
        named = (read_json_table(folder / "config.json", ModelError).get("architectures") or [""])[0]
        model_class = getattr(transformers, str(named), transformers.AutoModelForCausalLM)
        model = model_class.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code
        ).eval()
        if adapter is not None:
            model = importlib.import_module("peft").PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad():
            rows = [
                torch_row(torch, model, pair.prompt_ids, side)
                for pair in pairs
                for side in (pair.chosen_ids, pair.rejected_ids)
            ]
    except Exception as error:  # Whatever a model's own code raises means that there is nothing to compare with.
        raise ModelError(f"{folder}: transformers cannot run it ({reason_of(error)}).") from error
    return np.concatenate(rows)


def torch_row(torch: Any, model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Logps:
    """Log-probs of one completion's tokens by a PyTorch model."""
    ids = torch.tensor([[*prompt, *completion]])
    # The state at position t predicts token t + 1.
    logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return np.array(logps[range(len(completion)), list(completion)])


def difference_of(one: Logps, other: Logps) -> Difference:
    """How far apart they are; a number that is not finite is infinitely far."""
    apart = np.abs(one - other)
    apart[~np.isfinite(apart)] = math.inf
    return Difference(float(apart.max()), float(apart.mean()), apart.size)


def check_within(difference: Difference, limit: Limit, what: str) -> None:
    """Make sure that `difference` is within `limit`."""
    if not math.isfinite(difference.worst) or difference.worst > limit.worst or difference.mean > limit.mean:
        bound = f"worst {limit.worst:g}" if math.isfinite(limit.worst) else f"mean {limit.mean:g}"
        bound = bound if math.isfinite(min(limit)) else "finite numbers"
        raise ModelError(
            f"{what}: verification failed: log-probs differ by {difference} (allowed: {bound}), so nothing was kept; "
            "the conversion is wrong for this model, use its original."
        )


class Baseline(NamedTuple):
    """What a written model is compared with."""

    pairs: list[TokenizedPair]
    logps: Logps
    """Of the model before it was converted."""
    in_float32: bool
    """Whether it was run in float32, as transformers is."""
    without_adapter: Logps | None = None
    """Of a merged model before its adapter was put on."""


def record_baseline(task: Task, info: ModelInfo, adapter: Path | None = None) -> Baseline | None:
    """Log-probs of the model, with an adapter where one is given, before it is converted; None with --no-verify."""
    if not task.verify:
        return None
    # As what is written will be run: in float32 where that was asked for, whatever the device runs its checkpoints in.
    dtype = "float32" if task.dtype == "float32" else None
    if info.path.is_file() and is_float32(loaded_dtype(dtype)) and dtype is None:
        # What is written of a GGUF file has its blocks in float16.
        dtype = FLOAT16_IN_FLOAT32
    model = load(info, dtype=dtype, trust_remote_code=task.trust_remote_code).model
    exact = in_float32(model)
    pairs = probe_pairs(info.tokenizer, vocabulary_of(model), info.config)
    if adapter is None:
        return Baseline(pairs, model_logps(model, pairs), exact)
    plain = model_logps(model, pairs)
    add_trained_adapters(model, adapter)
    return Baseline(pairs, model_logps(model, pairs), exact, plain)


def in_float32(model: nn.Module) -> bool:
    """Whether all floating-point weights are in float32; those of quantised layers are their scales."""
    arrays = dict(tree_flatten(model.parameters())).values()
    return all(array.dtype == mx.float32 for array in arrays if mx.issubdtype(array.dtype, mx.floating))


def against_float32(limit: Limit, *, exact: bool) -> Limit:
    """How far a model may be from one that is run in float32, where it may itself be run in half precision."""
    return limit if exact or limit not in (EXACT, MERGED) else ROUNDED


def allowed_difference(task: Task, *, unchanged: Limit = EXACT) -> Limit:
    """How far log-probs may move; `unchanged` holds where neither dtype nor form changes."""
    if task.how is not None:
        return ROUNDED if task.how.bits == 8 else REPORTED
    return unchanged if task.dtype in (None, "float32") else ROUNDED


def verify_model(task: Task, folder: Path, baseline: Baseline | None, limit: Limit, original: Path | None) -> None:
    """Compare what was written with what was read, and with transformers' reading of `original` where torch is there.

    Raises:
        ModelError: they are further apart than `limit`, or what was written cannot be loaded.
    """
    if baseline is None:
        return
    after = folder_logps(folder, baseline.pairs, trust_remote_code=task.trust_remote_code)
    _compare_and_check(task, "the model as it was", baseline.logps, after, limit)
    if task.how is not None:
        print(scale_of(baseline, after))
    if original is None or not has_torch():
        return
    try:
        theirs = transformers_logps(original, baseline.pairs, trust_remote_code=task.trust_remote_code)
    except ModelError as error:
        print(f"not compared with transformers: {error}")
        return
    _compare_and_check(
        task, "transformers on PyTorch", theirs, after, against_float32(limit, exact=baseline.in_float32)
    )


def scale_of(baseline: Baseline, after: Logps) -> str:
    """What to hold a difference of log-probs against: how large they are, or what an adapter did, and how much is left.

    With b the log-probs of the base model, t of the tuned and a of the written one, (a - b)·(t - b) / |t - b|²: 100 %
    where quantising changed nothing, 0 % where nothing of the adapter's direction is left.
    """
    if baseline.without_adapter is None:
        return f"for scale: these tokens had a mean log-prob of {baseline.logps.mean():.2f} nats"
    effect = baseline.logps - baseline.without_adapter
    size = float(np.abs(effect).mean())
    if size == 0:
        return "for scale: the adapter itself changes nothing here"
    left = float(np.dot(after - baseline.without_adapter, effect) / np.dot(effect, effect))
    noise = float(np.abs(after - baseline.logps).mean()) / size
    return (
        f"for scale: the adapter itself moves them by mean {size:.2e}; {left:.0%} of that is left, under a change by "
        f"quantising of {noise:.2g} times its size"
    )


def verify_round_trip(task: Task, one: Adapter, back: Adapter) -> None:
    """Make sure that an adapter converted there and back is the same.

    Raises:
        ModelError: it is not.
    """
    for name in {*one.weights, *back.weights}:
        first = one.weights.get(name)
        second = back.weights.get(name)
        if first is None or second is None or first.dtype != second.dtype or not mx.array_equal(first, second).item():
            raise ModelError(f"{task.destination}: {name} does not come back as it was, so nothing was kept.")
    if one.config != back.config:
        raise ModelError(f"{task.destination}: the settings do not come back as they were, so nothing was kept.")
    print(f"verified: all {len(one.weights)} tensors and the settings come back bit for bit")


def verify_adapter(task: Task, base: SourceModel, mlx_folder: Path, peft_folder: Path) -> None:
    """mlx-lm runs the one form; PEFT, where it is installed, runs the other: their log-probs must be the same.

    Raises:
        ModelError: they are not, or mlx-lm cannot run it.
    """
    loaded = load(base.info, trust_remote_code=task.trust_remote_code)
    pairs = probe_pairs(base.info.tokenizer, vocabulary_of(loaded.model), base.info.config)
    exact = in_float32(loaded.model)
    add_trained_adapters(loaded.model, mlx_folder)
    ours = model_logps(loaded.model, pairs)
    # Of a number and itself the difference is 0, and not a number where it is none.
    check_within(difference_of(ours, ours), REPORTED, str(task.destination))
    if not has_torch() or importlib.util.find_spec("peft") is None or not base.files:
        return
    try:
        theirs = transformers_logps(base.folder, pairs, adapter=peft_folder, trust_remote_code=task.trust_remote_code)
    except ModelError as error:
        print(f"not compared with PEFT: {error}")
        return
    _compare_and_check(task, "PEFT on PyTorch", theirs, ours, against_float32(MERGED, exact=exact))


def _compare_and_check(task: Task, what: str, one: Logps, other: Logps, limit: Limit) -> None:
    """Print how far log-probs are apart, and make sure that it is within `limit`."""
    difference = difference_of(one, other)
    print(f"compared with {what}: {difference}")
    if task.how is not None and math.isinf(limit.mean) and difference.mean > _BAD_SIGN:
        print(
            f"A mean of {difference.mean:.2f} is a bad sign: a token's probability is off by a factor of "
            f"{math.exp(difference.mean):.1f} on average; take more bits, or smaller groups."
        )
    check_within(difference, limit, str(task.destination))

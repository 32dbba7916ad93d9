"""What DPO's reference costs: peaks of a step, measured here, and of larger models, predicted."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from orpo_mlx.compare.claims import COPY, DPO, ORPO
from orpo_mlx.compare.exercise.trainer import fresh_run
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.batching import micro_batches
from orpo_mlx.memory.cheap_products import cheap_products
from orpo_mlx.memory.fit import predicted
from orpo_mlx.memory.predict import made_window
from orpo_mlx.memory.skeleton import Blueprint, four_bit_blueprint, read_blueprint
from orpo_mlx.models.known_shapes import LLAMA_3_1_8B, LLAMA_3_2_3B
from orpo_mlx.models.loading import LoadedModel, load
from orpo_mlx.models.names import DEFAULT_MODEL
from orpo_mlx.process_memory import peak_gib
from orpo_mlx.training.steps.step import optimiser_step

_ARMS: Mapping[str, dict[str, Any]] = {
    ORPO: {"method": "orpo"},
    DPO: {"method": "dpo"},
    COPY: {"method": "dpo", "reference": "copy"},
}
PRECOMPUTED = "dpo --precompute-reference"
_LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
Shapes = tuple[tuple[int, int], ...]
"""Tokens a side and pairs a step, all of which are one micro-batch."""

_LARGE: Mapping[str, dict[str, Any]] = {"Llama-3.2-3B, 4 bits": LLAMA_3_2_3B, "Llama-3.1-8B, 4 bits": LLAMA_3_1_8B}


def measured_steps(loaded: LoadedModel, tokens: int, pairs: int, steps: int) -> dict[str, Any]:
    """Peak and seconds of a step by ORPO, DPO, and DPO with a second copy, on random pairs of one length.

    Keys of each: `steps`, `forward_tokens` (run without gradient over all steps), `peak_gib` (MLX's, of reference and
    step), `step_s` and `reference_s` (medians).
    """
    return {name: _measured(loaded, settings, tokens, pairs, steps) for name, settings in _ARMS.items()}


def _measured(loaded: LoadedModel, settings: dict[str, Any], tokens: int, pairs: int, steps: int) -> dict[str, Any]:
    config = TrainingConfig(
        batch_size=pairs, max_seq_length=tokens, lora_parameters=_LORA, num_layers=-1, memory="fast", **settings
    )
    vocabulary = int(loaded.config["vocab_size"])
    # What an earlier arm has left in a cycle would be part of this one's peak.
    gc.collect()
    mx.clear_cache()
    reference_s, step_s, forward = [], [], 0
    with fresh_run(loaded, config) as run:
        run.loaded.model.train()
        mx.reset_peak_memory()
        for step in range(1, steps + 1):
            window = made_window(dataclasses.replace(config, seed=step), tokens // 2, vocabulary)
            # Other pairs in each step: a reference that is remembered costs nothing.
            window = [pair._replace(prompt_ids=(step, *pair.prompt_ids[1:])) for pair in window]
            started = time.perf_counter()
            if run.reference is not None:
                run.reference.remember(micro_batches(window, config.batch_size, config.micro_batch_tokens))
                run.loaded.model.train()
                forward += sum(pair.pair_tokens for pair in window)
            begun = time.perf_counter()
            optimiser_step(run, window, step)
            reference_s.append(begun - started)
            step_s.append(time.perf_counter() - begun)
        peak = peak_gib()
    times = {"step_s": float(np.median(step_s)), "reference_s": float(np.median(reference_s))}
    return {"steps": steps, "forward_tokens": forward, "peak_gib": round(peak, 2), **times}


def measured_peaks(shapes: Shapes) -> list[dict[str, Any]]:
    """Peaks of one step at several lengths and numbers of pairs, LoRA and full fine-tuning, for each way to have a
    reference.

    Keys of a row: `fine_tune_type`, `tokens`, `pairs`, and `peaks_gib`: MLX's peak by arm, of reference and step, or of
    the step alone where the reference was precomputed.
    """
    return [
        {"fine_tune_type": kind, "tokens": tokens, "pairs": pairs, "peaks_gib": _peaks(kind, tokens, pairs)}
        for kind in ("lora", "full")
        for tokens, pairs in shapes
    ]


def _peaks(kind: str, tokens: int, pairs: int) -> dict[str, float]:
    arms = {**_ARMS, PRECOMPUTED: _ARMS[DPO]}
    return {
        name: round(_peak(kind, settings, tokens, pairs, name == PRECOMPUTED), 2) for name, settings in arms.items()
    }


def _peak(kind: str, settings: dict[str, Any], tokens: int, pairs: int, precomputed: bool) -> float:
    config = TrainingConfig(
        batch_size=pairs,
        max_seq_length=tokens,
        lora_parameters=_LORA,
        num_layers=-1,
        memory="fast",
        fine_tune_type=kind,
        micro_batch_tokens=4 * tokens * pairs,
        **settings,
    )
    gc.collect()
    mx.clear_cache()
    # Anew for each: full fine-tuning changes the weights.
    loaded = load(DEFAULT_MODEL)
    window = made_window(config, tokens // 2, int(loaded.config["vocab_size"]))
    with fresh_run(loaded, config) as run:
        mx.eval(loaded.model.parameters(), run.optimizer.state)
        mx.reset_peak_memory()
        if run.reference is not None:
            run.reference.remember(micro_batches(window, config.batch_size, config.micro_batch_tokens))
        if precomputed:
            mx.reset_peak_memory()
        run.loaded.model.train()
        optimiser_step(run, window, 1)
    return peak_gib()


def predicted_copies(small: Sequence[int], large: Sequence[int]) -> list[dict[str, Any]]:
    """The peak of an ORPO step with and without a second copy of the weights, for several models, lengths and modes.

    `copy_ratio` is (peak + weights)/peak: a copy's own activations are gone before the step's are made.

    Args:
        small: tokens of a side, for the default model.
        large: the same, for larger ones.
    """
    rows = _copies(DEFAULT_MODEL, read_blueprint(DEFAULT_MODEL), small)
    with cheap_products():
        for name, config in _LARGE.items():
            rows += _copies(name, four_bit_blueprint(config), large)
    return rows


def _copies(model: str, blueprint: Blueprint, lengths: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for mode in ("fast", "thrift"):
        for tokens in lengths:
            config = TrainingConfig(
                method="orpo", batch_size=1, max_seq_length=tokens, lora_parameters=_LORA, num_layers=-1, memory=mode
            )
            found = predicted(config, blueprint)
            rows.append(
                {
                    "model": model,
                    "memory": mode,
                    "tokens": tokens,
                    "weights_gib": round(found.weights, 2),
                    "peak_gib": round(found.peak, 2),
                    "copy_ratio": round((found.peak + found.weights) / found.peak, 2),
                }
            )
    return rows

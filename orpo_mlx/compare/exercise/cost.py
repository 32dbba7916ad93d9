"""What DPO's reference costs: peaks of a step, measured here, and of larger models, predicted."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from orpo_mlx.compare.exercise.trainer import fresh_run
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.batching import micro_batches
from orpo_mlx.memory.fit import predicted
from orpo_mlx.memory.predict import made_window
from orpo_mlx.memory.skeleton import read_blueprint
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.models.names import DEFAULT_MODEL
from orpo_mlx.training.steps.step import optimiser_step

_GIB = 2**30
_ARMS: Mapping[str, dict[str, Any]] = {
    "orpo": {"method": "orpo"},
    "dpo": {"method": "dpo"},
    "dpo --reference copy": {"method": "dpo", "reference": "copy"},
}


def measured_steps(loaded: LoadedModel, tokens: int, pairs: int, steps: int) -> dict[str, Any]:
    """Peak and seconds of a step by ORPO, DPO, and DPO with a second copy, on random pairs of one length.

    Keys of each: `steps`, `forward_tokens` (run without gradient over all steps), `peak_gib` (MLX's, of reference and
    step), `step_s` and `reference_s` (medians).
    """
    return {name: _measured(loaded, settings, tokens, pairs, steps) for name, settings in _ARMS.items()}


def _measured(loaded: LoadedModel, settings: dict[str, Any], tokens: int, pairs: int, steps: int) -> dict[str, Any]:
    lora = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    config = TrainingConfig(
        batch_size=pairs, max_seq_length=tokens, lora_parameters=lora, num_layers=-1, memory="fast", **settings
    )
    vocabulary = int(loaded.config["vocab_size"])
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
        peak = mx.get_peak_memory() / _GIB
    times = {"step_s": float(np.median(step_s)), "reference_s": float(np.median(reference_s))}
    return {"steps": steps, "forward_tokens": forward, "peak_gib": round(peak, 2), **times}


def predicted_copies() -> list[dict[str, Any]]:
    """The peak of an ORPO step with and without a second copy of the weights, for several lengths and memory modes.

    `copy_ratio` is (peak + weights)/peak: a copy's own activations are gone before the step's are made.
    """
    blueprint = read_blueprint(DEFAULT_MODEL)
    rows = []
    for mode in ("fast", "thrift"):
        for tokens in (32, 128, 512):
            lora = {"rank": 8, "scale": 20.0, "dropout": 0.0}
            config = TrainingConfig(
                method="orpo", batch_size=1, max_seq_length=tokens, lora_parameters=lora, num_layers=-1, memory=mode
            )
            found = predicted(config, blueprint)
            rows.append(
                {
                    "model": DEFAULT_MODEL,
                    "memory": mode,
                    "tokens": tokens,
                    "weights_gib": round(found.weights, 2),
                    "peak_gib": round(found.peak, 2),
                    "copy_ratio": round((found.peak + found.weights) / found.peak, 2),
                }
            )
    return rows

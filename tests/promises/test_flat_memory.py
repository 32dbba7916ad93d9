"""Memory over a long run: 500 steps on pairs of mixed lengths, in a process of its own."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

STEPS, PAIRS, BATCH_SIZE = 500, 100, 2
EPOCH = PAIRS // BATCH_SIZE
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "max_position_embeddings": 2048}


class Sample(NamedTuple):
    """GiB after a step; the peak is that of the epoch so far."""

    peak: float
    cache: float
    footprint: float


def samples(folder: Path) -> list[Sample]:
    """One for each step."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    from orpo_mlx.config.checks import make_config
    from orpo_mlx.data.batching import TrainingOrder
    from orpo_mlx.process_memory import configure_allocator, process_footprint
    from orpo_mlx.training.prepare import prepare
    from orpo_mlx.training.steps.step import optimiser_step
    from orpo_mlx.types import TokenizedPair
    from tests.conftest import model_config, write_id_rows

    config = {**model_config("llama", 8192), **SIZES}
    model_class, args_class = _get_classes(config)
    (folder / "model").mkdir()
    weights = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model" / "model.safetensors"), weights)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(4), np.log(300), (PAIRS, 3))).astype(int)
    sides = [[tuple(map(int, rng.integers(0, 8192, n))) for n in row] for row in lengths]
    pairs = [TokenizedPair(prompt, chosen, rejected) for prompt, chosen, rejected in sides]
    write_id_rows(folder / "train.jsonl", pairs)
    settings = {"model": str(folder / "model"), "data": str(folder), "adapter_path": str(folder / "out")}
    configure_allocator()
    run = prepare(make_config({**settings, "batch_size": BATCH_SIZE, "memory": "fast", "method": "dpo"}))
    run.loaded.model.train()
    stored = run.splits["train"].pairs
    found = []
    for step, indices in enumerate(itertools.islice(TrainingOrder(stored, BATCH_SIZE, seed=0, shuffle=True), STEPS)):
        if step % EPOCH == 0:
            mx.reset_peak_memory()
        optimiser_step(run, [stored[index] for index in indices], step + 1)
        gib = 2**30
        found.append(Sample(mx.get_peak_memory() / gib, mx.get_cache_memory() / gib, process_footprint().now_gib))
    return found


@pytest.mark.slow
def test_peak_cache_and_footprint_are_flat_after_the_first_epoch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.promises.test_flat_memory", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [Sample(*row) for row in json.loads(done.stdout)]
    assert len(found) == STEPS
    first, rest = found[:EPOCH], found[EPOCH:]
    for name in Sample._fields:
        # Which pairs share a step differs from epoch to epoch.
        assert max(getattr(s, name) for s in rest) <= 1.05 * max(getattr(s, name) for s in first) + 0.01, name
    # And no creeping: the last epochs are where the second was.
    assert max(s.footprint for s in found[-EPOCH:]) <= 1.05 * max(s.footprint for s in found[EPOCH : 2 * EPOCH])


if __name__ == "__main__":
    import orpo_mlx  # noqa: F401  (BLAS before MLX)

    print(json.dumps(samples(Path(sys.argv[1]))))

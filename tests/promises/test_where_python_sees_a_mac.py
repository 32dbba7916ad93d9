"""The commands where every question about the device is answered as on a Mac: what only a GPU takes is run as well.

MLX computes on the CPU throughout, so figures are a CPU's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.cli.chat import main as chat
from orpo_mlx.cli.convert import main as convert
from orpo_mlx.cli.evaluate import main as evaluate
from orpo_mlx.cli.score import main as score
from orpo_mlx.cli.train import main as train
from orpo_mlx.convert import verify
from orpo_mlx.models.loading import load
from tests.conftest import write_model_folder, write_rows
from tests.helpers.as_on_a_gpu import answer_as_a_gpu

JUDGE = ("--judge", "rule:regex=a")
FLOAT32 = ("--dtype", "float32")
NO_REPORT = "--no-report"


@pytest.fixture(autouse=True)
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_as_a_gpu(monkeypatch, metal=True)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, as the Hub has them."""
    folder = write_model_folder(tmp_path_factory.mktemp("models") / "half")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    rounded = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.eval(rounded)
    mx.save_safetensors(str(folder / "model.safetensors"), rounded)
    return folder


@pytest.fixture(scope="module")
def gguf(half: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("models") / "half.gguf"
    assert convert(["to-gguf", str(half), str(file), "--dtype", "float16"]) == 0
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(6)]
    for split in ("train", "valid", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    return tmp_path / "data"


def dtypes(model: nn.Module) -> set[mx.Dtype]:
    return {array.dtype for array in dict(tree_flatten(model.parameters())).values()}


@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16-in-float32"])
def test_models_of_every_form_are_loaded(half: Path, gguf: Path, asked: str | None) -> None:
    found = [dtypes(load(str(each), dtype=asked).model) for each in (half, gguf)]
    if asked is None:
        # The checkpoint's own; norms of a GGUF file are float32.
        assert found[0] == {mx.bfloat16}
        assert mx.float16 in found[1]
    else:
        assert found == 2 * [{mx.bfloat16 if asked == "bfloat16" else mx.float32}]


# Pictures know nothing of the device.
@pytest.mark.parametrize("more", [(), ("--memory", "thrift", NO_REPORT)])
@pytest.mark.usefixtures("undrawn")
def test_a_run_is_trained_resumed_and_used(half: Path, data: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    adapters = tmp_path / "adapters"
    words = ["--model", str(half), "--data", str(data), "--adapter-path", str(adapters), "--method", "dpo", *more]
    words += ["--batch-size", "2", "--save-every", "1", "--learning-rate", "1e-3"]
    assert train([*words, "--iters", "2", NO_REPORT]) == 0
    assert train([*words, "--iters", "3", "--resume"]) == 0
    rows = [json.loads(line) for line in (adapters / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))
    assert chat(["--adapter-path", str(adapters), "--prompt", "Say 1.", "--max-tokens", "4"]) == 0
    assert score(["--adapter-path", str(adapters), "--data", str(data / "test.jsonl")]) == 0
    assert (
        evaluate(["--adapter-path", str(adapters), "--data", str(data / "test.jsonl"), "--max-tokens", "4", *JUDGE])
        == 0
    )
    merged = tmp_path / "merged"
    assert convert(["merge", "--model", str(half), "--adapter-path", str(adapters), str(merged)]) == 0
    assert dtypes(load(str(merged)).model) == {mx.bfloat16}
    wide = tmp_path / "wide"
    assert convert(["merge", "--model", str(half), "--adapter-path", str(adapters), str(wide), *FLOAT32]) == 0
    assert dtypes(load(str(wide)).model) == {mx.float32}


def test_conversions_are_held_against_float32_with_what_half_precision_costs(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert(["hf", str(half), str(tmp_path / "wide"), *FLOAT32]) == 0

    def in_float32(folder: Path, pairs: Any, **_: Any) -> verify.Logps:
        return verify.model_logps(load(str(folder), dtype="float32").model, pairs)

    # As transformers would run the very same weights.
    monkeypatch.setattr(verify, "has_torch", lambda: True)
    monkeypatch.setattr(verify, "transformers_logps", in_float32)
    assert convert(["hf", str(half), str(tmp_path / "same")]) == 0
    monkeypatch.setattr(verify, "transformers_logps", lambda *_, **__: in_float32(*_) + 1.0)
    assert convert(["hf", str(half), str(tmp_path / "wrong")]) == 2


def test_a_gguf_file_is_converted_and_trained_on(gguf: Path, data: Path, tmp_path: Path) -> None:
    assert convert(["gguf", str(gguf), str(tmp_path / "folder")]) == 0
    words = ["--model", str(gguf), "--data", str(data), "--adapter-path", str(tmp_path / "adapters")]
    assert train([*words, "--iters", "1", "--batch-size", "2", NO_REPORT]) == 0

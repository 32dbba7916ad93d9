"""Training steps of this package, counted."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.config.settings import TrainingConfig
from scripts.graph.cost_model import CHIPS, Chip, estimate
from scripts.graph.count import Cost, counting
from scripts.graph.steps import MODELS, WORKLOADS, Workload, empty_model, sample_pairs, training_step
from tests.helpers.compile_without_kernels import fuse_nothing

SETTINGS: dict[str, Any] = MODELS["SmolLM2-135M"] | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
}
TINY = Workload("tiny", mx.float32, None, 1, 24, 20)
PLAIN = dataclasses.replace(TrainingConfig(), memory="plain")


def counted(layers: int, *, evaluate: bool = False) -> Cost:
    model = empty_model(SETTINGS | {"num_hidden_layers": layers}, TINY.dtype)
    step = training_step(PLAIN, model, sample_pairs(TINY))
    with counting(evaluate=evaluate) as cost:
        cost.add(step())
    return cost


def test_each_layer_costs_the_same() -> None:
    two, three, four = (counted(layers) for layers in (2, 3, 4))
    assert four.nodes.total() - three.nodes.total() == three.nodes.total() - two.nodes.total() > 0
    assert four.dispatches - three.dispatches == three.dispatches - two.dispatches > 0
    assert four.evals == two.evals
    assert four.host_waits == two.host_waits


# A pair's prompt long enough to be shared, two pairs in one batch.
SHARED = Workload("tiny", mx.float32, None, 2, 80, 40)
BUDGETS = {
    # A step of 30 such layers, as SmolLM2-135M has them, may take 14,000 dispatches and 28,000 nodes in `fast`, and 2.5
    # times that in modes that run layers again.
    "fast": (230, 540),
    "balanced": (265, 640),
    "thrift": (290, 700),
}
"""Dispatches and nodes of a llama layer in one step on a GPU."""


@pytest.mark.parametrize("mode", BUDGETS)
def test_what_a_layer_may_cost_on_a_gpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", "gpu")
    config = dataclasses.replace(TrainingConfig(), memory=mode, micro_batch_tokens=4096)
    costs = []
    for layers in (5, 10):
        model = empty_model(SETTINGS | {"num_hidden_layers": layers}, SHARED.dtype)
        # Assembled with MLX's fused primitives in place: those that would raise under a gradient would raise here.
        step = training_step(config, model, sample_pairs(SHARED))
        with counting() as cost:
            cost.add(step())
        costs.append(cost)
    dispatches, nodes = BUDGETS[mode]
    assert costs[1].dispatches - costs[0].dispatches <= 5 * dispatches
    assert costs[1].nodes.total() - costs[0].nodes.total() <= 5 * nodes
    for cost in costs:
        # The host waits for the gradient and for the update, and reads nothing that is not there.
        assert cost.stops == 2
        assert cost.host_waits == 0
        assert cost.evals - cost.async_evals == 2
        assert cost.evals <= 5


@pytest.mark.parametrize("workload", [one for one in WORKLOADS if one.bits], ids=lambda one: one.model)
def test_running_layers_again_is_not_slower_than_plain(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", "gpu")

    def seconds(mode: str, chip: Chip) -> float:
        """Of the device, at the model's whole depth: each layer costs the same."""
        found = []
        for layers in (2, 3):
            model = empty_model(MODELS[workload.model] | {"num_hidden_layers": layers}, workload.dtype, workload.bits)
            step = training_step(dataclasses.replace(TrainingConfig(), memory=mode), model, sample_pairs(workload))
            with counting() as cost:
                cost.add(step())
            found.append(estimate(cost.nodes, chip).device)
        depth: int = MODELS[workload.model]["num_hidden_layers"]
        return found[1] + (depth - 3) * (found[1] - found[0])

    # Of all chips, the one whose products are the slowest beside its memory: what is computed again costs most there.
    chip = CHIPS["M1 Max"]
    assert seconds("thrift", chip) < seconds("plain", chip)


def test_evaluating_counts_the_same() -> None:
    fuse_nothing()  # Computed, each fused kernel would first be made by a C++ compiler.
    lazy, evaluated = counted(2), counted(2, evaluate=True)
    assert lazy.nodes == evaluated.nodes
    assert (lazy.evals, lazy.host_waits) == (evaluated.evals, evaluated.host_waits)


def test_an_empty_model_takes_no_memory() -> None:
    before = mx.get_active_memory()
    model = empty_model(MODELS["Qwen3-4B"], mx.bfloat16, bits=4)
    weights = dict(tree_flatten(model.parameters()))
    assert mx.get_active_memory() - before < 1 << 20
    assert weights["model.layers.35.mlp.up_proj.weight"].shape == (9728, 2560 // 8)
    assert weights["model.layers.35.mlp.up_proj.scales"].dtype == mx.bfloat16
    assert not model.trainable_parameters()["model"]["layers"][0]["mlp"]["up_proj"]


def test_pairs_are_as_long_as_they_should_be() -> None:
    first, second = sample_pairs(TINY._replace(pairs=2))
    assert [len(side) for side in first[:3]] == [24, 20, 20]
    assert [len(side) for side in second[:3]] == [7, 15, 11]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # What the script sets for its own process must not stay in this one, or later tests take a GPU's branches.
    monkeypatch.setenv("ORPO_MLX_PROFILE", "gpu")
    path = Path(__file__).resolve().parents[3] / "scripts" / "graph_cost.py"
    spec = importlib.util.spec_from_file_location("graph_cost_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORKLOADS", (TINY,))
    monkeypatch.setitem(MODELS, "tiny", SETTINGS)
    return module


def test_the_script_writes_what_it_prints(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "ours.json", tmp_path / "other.json"
    assert script.main(["--json", str(file), "--modes", "plain"]) == 0
    (record,) = json.loads(file.read_text())["records"]
    assert {"dispatches", "nodes", "evals", "host_waits", "tflop", "gigabytes", "seconds"} <= set(record)
    assert set(record["seconds"]) >= {"M1 Max", "M2 Ultra", "M3 Max", "M4 Max", "M5 Max"}
    assert record["dispatches"] == counted(2).dispatches
    other.write_text(json.dumps({"records": [record | {"trainer": "rival"}, record | {"workload": "another"}]}))
    capsys.readouterr()
    assert script.main(["--against", str(other), "--modes", "plain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if str(record["dispatches"]) in line] == ["rival", "orpo-mlx"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--against {d}/other.json",
            "--against {d}/other.json: found no records of this script ({d}/other.json: holds",
        ),
        ("--against {d}/part.json", "--against {d}/part.json: found no records of this script ('mode')."),
        ("--against {d}/pipe.json", "{d}/pipe.json: is no regular file"),
        ("--only nothing", "--only nothing: no workload's title contains that, expected a part of one of "),
        ("--only=", "--only: is empty; give a value"),
        ("--json {d}/no/x.json", "--json {d}/no/x.json: cannot be written there"),
        ("--json {d}/part.json --against {d}/part.json", "--json {d}/part.json: is what --against names"),
        ("--mode plain", "unrecognized arguments: --mode plain; did you mean --modes?"),
    ],
)
def test_the_script_refuses_in_one_sentence(
    script: Any, words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text("[]")
    record = {"workload": TINY.title, "trainer": "rival"}
    (tmp_path / "part.json").write_text(json.dumps({"records": [record]}))
    os.mkfifo(tmp_path / "pipe.json")
    try:
        status = script.main([word.format(d=tmp_path) for word in words.split()])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert said.format(d=tmp_path) in error
    assert error.count("\n") == 1

"""References besides the policy's own start: the base, another model, adapters, and one that follows the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from orpo_mlx.cli.convert import main as convert
from orpo_mlx.data.batching import collate
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.errors import UserError
from orpo_mlx.models.adapters import adapter_weights, add_adapters, add_trained_adapters
from orpo_mlx.models.loading import load
from orpo_mlx.training.references.other_references import SyncedReference
from orpo_mlx.training.steps.step import optimiser_step
from tests.conftest import make_model, make_pairs, write_model_folder
from tests.convert.test_peft_adapters import write_peft_folder
from tests.helpers import float64_losses as oracle
from tests.helpers.quiet_training import make_run, rows, run_quietly

PAIRS = make_pairs(6)


@pytest.fixture(scope="module")
def sft(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that somebody has trained on the tiny model."""
    folder = tmp_path_factory.mktemp("sft")
    model = load(str(model_folder)).model
    add_adapters(model, "lora", -1, {"rank": 3, "scale": 5.0, "dropout": 0.0})
    mx.random.seed(4)
    noise = {name: mx.random.normal(array.shape) / 8 for name, array in adapter_weights(model).items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), noise)
    lora = {"rank": 3, "scale": 5.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def logps_of(model: nn.Module) -> mx.array:
    return pair_logps(PairScorer(model), collate(PAIRS)).chosen


def test_the_base_under_a_warm_start(settings: dict[str, Any], model_folder: Path, sft: Path) -> None:
    lora = {"rank": 3, "scale": 5.0}
    warm = {**settings, "method": "dpo", "resume_adapter_file": str(sft), "lora_parameters": lora}
    run = make_run(warm, reference="base")
    assert run.reference is not None
    assert not run.reference.needs_precomputing
    base = logps_of(load(str(model_folder)).model)
    assert mx.array_equal(run.reference(PAIRS, collate(PAIRS)).chosen, base).item()
    run_quietly({**warm, "reference": "base"})
    policy, metrics = logps_of(run.loaded.model), rows(settings, "valid")[0]
    assert not mx.allclose(policy, base, atol=1e-2).item()
    # The untrained policy's log-probs are not this reference's.
    assert metrics["loss"] != pytest.approx(np.log(2), abs=1e-3)
    assert metrics["rewards/chosen"] != pytest.approx(0, abs=1e-3)


def test_adapters_under_fresh_ones(settings: dict[str, Any], model_folder: Path, sft: Path) -> None:
    run = make_run(settings, method="dpo", reference=str(sft))
    model = load(str(model_folder)).model
    add_trained_adapters(model, sft)
    expected = logps_of(model)
    assert run.reference is not None
    first = run.reference(PAIRS, collate(PAIRS)).chosen
    np.testing.assert_allclose(np.array(first), np.array(expected), rtol=1e-5)
    for step in (1, 2):
        optimiser_step(run, PAIRS, step)
    assert mx.array_equal(run.reference(PAIRS, collate(PAIRS)).chosen, first).item()
    # Started from the same adapters, the policy is its reference.
    lora = {"rank": 3, "scale": 5.0}
    warm = {**settings, "method": "dpo", "resume_adapter_file": str(sft), "lora_parameters": lora}
    run_quietly({**warm, "reference": str(sft)})
    assert rows(settings, "train")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("changes", [{"use_rslora": True, "layers": (0,)}, {"use_dora": True}])
def test_pefts_adapters_are_those_that_convert_makes_of_them(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    peft = write_peft_folder(tmp_path / "peft", **changes)
    converted = tmp_path / "mlx"
    assert convert(["peft-to-mlx", str(peft), str(converted), "--model", str(model_folder), "--no-verify"]) == 0
    found = []
    for folder in (peft, converted):
        run = make_run(settings, method="dpo", reference=str(folder))
        assert run.reference is not None
        found.append(run.reference(PAIRS, collate(PAIRS)).chosen)
    assert mx.array_equal(found[0], found[1]).item()
    assert not mx.allclose(found[0], logps_of(load(str(model_folder)).model), atol=1e-2).item()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alpha_pattern": {"down_proj": 64}}, "makes layers differ"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
)
def test_what_pefts_adapters_say_that_mlx_lms_cannot(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    peft = write_peft_folder(tmp_path / "peft", **changes)
    with pytest.raises(UserError, match=expected):
        make_run(settings, method="dpo", reference=str(peft))


def test_another_model_and_what_is_remembered_of_it(
    settings: dict[str, Any], tmp_path: Path, sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_model_folder(tmp_path / "other", "mistral")
    (other / "config.json").write_text((other / "config.json").read_text().replace("10000.0", "500.0"))
    run = make_run(settings, method="dpo", reference=str(other))
    assert run.reference is not None
    found = run.reference(PAIRS, collate(PAIRS)).chosen
    np.testing.assert_allclose(np.array(found), np.array(logps_of(load(str(other)).model)), rtol=1e-5)
    run.reference.table.save()
    again = make_run(settings, method="dpo", reference=str(other)).reference
    elsewhere = make_run(settings, method="dpo", reference=str(sft)).reference
    assert again is not None
    assert elsewhere is not None
    assert (len(again.table), len(elsewhere.table)) == (6, 0)
    monkeypatch.setattr(PairScorer, "__call__", None)
    assert mx.array_equal(again(PAIRS, collate(PAIRS)).chosen, found).item()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "orpo", "reference": "base"}, "`reference`: method orpo compares with no reference"),
        ({"method": "orpo", "sync_reference": "1,2"}, "`sync_reference`: method orpo compares with no reference"),
        ({"reference": "./bse"}, "`reference` ./bse: no such file or folder"),
        ({"reference": "OTHER"}, "its tokenizer is another than that of `model`"),
        ({"reference": "EMPTY"}, "`reference` .*: holds neither adapters.safetensors nor PEFT's"),
        ({"reference": "base", "fine_tune_type": "full", "resume_adapter_file": "x"}, "takes the place of the model's"),
        ({"sync_reference": "0.5"}, "`sync_reference`: found '0.5', expected TAU,STEPS"),
        ({"sync_reference": "0,3"}, "`sync_reference`: found '0,3', expected TAU,STEPS"),
        ({"sync_reference": "1.5,3"}, "expected TAU,STEPS with TAU above 0 and at most 1"),
        ({"sync_reference": "0.5,0"}, "expected TAU,STEPS"),
        ({"sync_reference": "0.5,2", "fine_tune_type": "dora"}, "a mix of two DoRA models is no DoRA model"),
        ({"sync_reference": "0.5,2", "reference": "copy"}, "`reference=copy` stays as it is"),
        ({"sync_reference": "0.5,2", "precompute_reference": True}, "stale once `sync_reference` has moved"),
    ],
)
def test_what_cannot_be_compared_with(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    if changes.get("reference") == "OTHER":
        changes = {"reference": str(write_model_folder(tmp_path / "other"))}
        file = tmp_path / "other" / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(tokenizer))
    if changes.get("reference") == "EMPTY":
        changes = {"reference": str(tmp_path / "empty")}
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=expected):
        make_run({**settings, "method": "dpo", **changes})


def dense_weights(model: nn.Module) -> dict[str, oracle.Array]:
    """The weights of all layers, adapters multiplied out, in float64."""
    weights = {}
    for name, module in model.named_modules():
        if "lora_a" in module:
            a, b = np.array(module.lora_a, np.float64), np.array(module.lora_b, np.float64)
            product = b @ a if a.ndim == 3 else (a @ b).T
            weights[f"{name}.weight"] = np.array(module.linear.weight, np.float64) + module.scale * product
        elif "weight" in module and not name.endswith(".linear"):
            weights[f"{name}.weight"] = np.array(module.weight, np.float64)
    return weights


@pytest.mark.parametrize(
    ("kind", "fine_tune_type", "tau"),
    [
        ("llama", "lora", 0.6),
        ("mixtral", "lora", 0.3),
        ("llama", "full", 0.6),
        ("llama", "dora", 1.0),
        ("llama", "lora", 1.0),
    ],
)
def test_the_reference_follows_the_policys_weights(
    settings: dict[str, Any], tmp_path: Path, kind: str, fine_tune_type: str, tau: float
) -> None:
    """Weights and log-probs are those of π_ref <- τ π + (1 - τ) π_ref multiplied out; ranks do not grow for ever."""
    folder = write_model_folder(tmp_path / "model", kind)
    keys = ["self_attn.q_proj", "block_sparse_moe.switch_mlp.up_proj" if kind == "mixtral" else "mlp.down_proj"]
    changes: dict[str, Any] = {"method": "dpo", "model": str(folder), "fine_tune_type": fine_tune_type}
    changes["learning_rate"] = 3e-2
    if fine_tune_type != "full":
        changes["lora_parameters"] = {"rank": 8, "scale": 2.0, "keys": keys}
    run = make_run(settings, **changes, sync_reference=f"{tau},2")
    reference = run.reference
    assert isinstance(reference, SyncedReference)
    start = reference(PAIRS, collate(PAIRS)).chosen
    mixed = dense_weights(run.loaded.model)
    for step in range(1, 13):
        optimiser_step(run, PAIRS, step)
        stale = reference(PAIRS, collate(PAIRS)).chosen
        reference.after_step(step)
        if step % 2 == 0:
            policy = dense_weights(run.loaded.model)
            mixed = {name: tau * policy[name] + (1 - tau) * array for name, array in mixed.items()}
        fresh = reference(PAIRS, collate(PAIRS)).chosen
        assert mx.array_equal(stale, fresh).item() == (step % 2 != 0)
        assert step > 1 or mx.array_equal(stale, start).item()
    if fine_tune_type != "dora":
        for name, found in dense_weights(reference.runner.model).items():
            np.testing.assert_allclose(found, mixed[name], rtol=0, atol=2e-5 * np.abs(mixed[name]).max(), err_msg=name)
    expected = make_model(kind)
    if fine_tune_type == "dora":
        expected = run.loaded.model
    else:
        expected.load_weights([(name, mx.array(array.astype(np.float32))) for name, array in mixed.items()])
    np.testing.assert_allclose(np.array(fresh), np.array(logps_of(expected)), rtol=1e-4)
    adapters = [module for _, module in reference.runner.model.named_modules() if "lora_b" in module]
    # A product has at most the rank of its smaller side, here 48.
    assert all(module.lora_b.shape[-1 if module.lora_b.ndim == 3 else 0] <= 48 for module in adapters)


def test_closing_figures_of_all_splits_are_against_the_reference_as_it_is_then(settings: dict[str, Any]) -> None:
    # It is the policy after each step: nothing is left between the two.
    run_quietly({**settings, "method": "dpo", "sync_reference": "1,1", "learning_rate": 1e-2})
    for split in ("valid", "test"):
        for row in rows(settings, split)[:: len(rows(settings, split)) - 1]:
            assert row["loss"] == pytest.approx(np.log(2), abs=1e-4), (split, row["step"])
            assert row["rewards/chosen"] == pytest.approx(0, abs=1e-3)


def test_figures_before_training_are_not_against_a_reference_that_has_moved(
    settings: dict[str, Any], data: Path
) -> None:
    # Rows of the last step, which the reference of then remembers.
    (data / "test.jsonl").write_text((data / "train.jsonl").read_text())
    run_quietly({**settings, "method": "dpo", "sync_reference": "1,2", "learning_rate": 3e-2})
    before, after = rows(settings, "test")
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert after["loss"] != pytest.approx(np.log(2), abs=1e-3)

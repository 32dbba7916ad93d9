"""A NaN in a row, a gradient or a weight: named, never applied, never in a file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.device_profile import device_profile
from orpo_mlx.errors import NonFiniteError, TrainingError
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.gradients import micro_batch_inputs
from orpo_mlx.training.steps.step import clip_factor, optimiser_step
from orpo_mlx.training.steps.step_functions import StepFunctions
from orpo_mlx.types import LossOutput, PairLogProbs
from tests.helpers.kill_and_resume import records
from tests.helpers.quiet_training import flags, make_run, run_quietly, trainable
from tests.training.checkpoints.test_resume import LONG, assert_same, fail_before

NAME = "model.layers.1.self_attn.q_proj.lora_a"


def spoil_row(monkeypatch: pytest.MonkeyPatch, chosen: tuple[int, ...]) -> None:
    """Let the chosen log-prob of the pair with that chosen completion be NaN."""
    from orpo_mlx.engine.pair_scorer import pair_logps as good

    def spoiled(scorer: Any, batch: Any, **options: Any) -> PairLogProbs:
        logps = good(scorer, batch, **options)
        if device_profile().compiled:
            # By their sum, which can be traced.
            bad = mx.where(batch.chosen, batch.targets, 0).sum(axis=1) == sum(chosen)
        else:
            ids = np.array(batch.targets)
            bad = mx.array([tuple(ids[own].tolist()) == tuple(chosen) for own in np.array(batch.chosen)])
        return logps._replace(chosen=mx.where(bad, mx.nan, logps.chosen))

    # Where `log_probs` finds it, which both the loss's gradient and the step take.
    monkeypatch.setattr("orpo_mlx.engine.pair_scorer.pair_logps", spoiled)


def spoil_gradient(run: Run) -> None:
    good = run.memory.value_and_grad

    def spoiled(*arguments: Any) -> Any:
        output, gradients = good(*arguments)
        # Only where pairs come together, so that no row does this alone.
        if len(arguments[0].chosen) > 1:
            gradients[NAME] = gradients[NAME].at[0, 0].add(mx.inf)
        return output, gradients

    run.memory = run.memory._replace(value_and_grad=spoiled)
    forget_compiled(run)


def forget_compiled(run: Run) -> None:
    """What was compiled before something was spoiled has the good one in it."""
    run.functions = StepFunctions(run.scorer, run.memory, run.method, run.optimizer)


@pytest.mark.parametrize("method", ["orpo", "dpo", "aot", "sft"])
def test_a_row_is_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    run = make_run(settings, method=method)
    pairs = list(run.splits["train"].pairs[:4])
    before = trainable(run)
    spoil_row(monkeypatch, pairs[2].completions[0])
    with pytest.raises(NonFiniteError) as caught:
        optimiser_step(run, pairs, 7)
    message = str(caught.value)
    assert message.startswith("step 7: ")
    assert f" on {pairs[2].location}" in message
    assert not any(f"{pair.location}" in message for pair in (pairs[0], pairs[1], pairs[3]))
    assert "gradient's norm " in message
    for name, value in trainable(run).items():
        assert np.array_equal(value, before[name])


def test_a_gradient_is_named(settings: dict[str, Any]) -> None:
    run = make_run(settings)
    spoil_gradient(run)
    pairs = [run.splits["train"].pairs[0]] * 2
    found = rf"norm (inf|nan) on .*the gradient of {NAME} is not finite, with no row"
    with pytest.raises(NonFiniteError, match=f"{found}.*`on_nonfinite=skip`"):
        optimiser_step(run, pairs, 7)
    # What is given already is no advice.
    run.config = dataclasses.replace(run.config, on_nonfinite="skip")
    with pytest.raises(NonFiniteError, match=found) as caught:
        optimiser_step(run, pairs, 7)
    assert "on_nonfinite" not in str(caught.value)


def test_a_weight_is_named(settings: dict[str, Any]) -> None:
    run = make_run(settings)
    weights = adapter_weights(run.loaded.model)
    run.loaded.model.load_weights([(NAME, weights[NAME].at[0, 0].add(mx.nan))], strict=False)
    with pytest.raises(NonFiniteError, match=f"the weight {NAME} is not finite itself"):
        optimiser_step(run, run.splits["train"].pairs[:2], 7)


def assert_no_nan(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            arrays = mx.load(str(path))
            assert isinstance(arrays, dict)
            assert all(mx.isfinite(array).all().item() for array in arrays.values()), path
        elif path.suffix in (".json", ".jsonl"):
            for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():

                def refuse(name: str, path: Path = path) -> None:
                    raise AssertionError(f"{name} in {path}")

                json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("where", ["row", "gradient", "weight"])
def test_no_nan_reaches_a_file(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(run: Run, pairs: Any, number: int) -> Any:
        if number == 3 and where == "row":
            spoil_row(monkeypatch, pairs[0].completions[0])
            forget_compiled(run)
        elif number == 3 and where == "gradient":
            spoil_gradient(run)
        means = optimiser_step(run, pairs, number)
        if number == 2 and where == "weight":
            weights = adapter_weights(run.loaded.model)
            run.loaded.model.load_weights([(NAME, weights[NAME] * mx.nan)], strict=False)
        return means

    monkeypatch.setattr("orpo_mlx.training.loop.optimiser_step", step)
    assert main([*flags({**settings, **LONG}), "--save-every", "1", "--micro-batch-tokens", "4096"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "step 3: the loss is" in err or f"{NAME} is not finite after step 2, so it is not saved" in err
    folder = Path(settings["adapter_path"])
    assert "step 2 is saved" in err or where == "weight"
    assert (folder / "checkpoints" / ("step-0000001" if where == "weight" else "step-0000002")).is_dir()
    assert_no_nan(folder)


def test_steps_are_skipped_counted_and_too_many_end_the_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings |= {**LONG, "on_nonfinite": "skip", "lora_parameters": {"dropout": 0.1}}
    pairs = make_run({**settings, "adapter_path": str(tmp_path / "other")}).splits["train"].pairs[:1]
    spoil_row(monkeypatch, pairs[0].completions[0])
    whole = tmp_path / "whole"
    run_quietly({**settings, "adapter_path": str(whole)})
    # Nine steps are three epochs, and the row is met once in each.
    assert [row["skipped"] for row in records(whole) if row["split"] == "train"][-1] == 3
    assert_no_nan(whole)
    with pytest.MonkeyPatch.context() as patch:
        fail_before(6, patch)
        with pytest.raises(Exception, match="step 5 is saved"):
            run_quietly(settings)
    run_quietly({**settings, "resume": True})
    assert_same(whole, Path(settings["adapter_path"]))
    argv = flags({key: value for key, value in settings.items() if key != "lora_parameters"})
    assert main([*argv, "--max-skipped", "1"]) == 2
    err = capsys.readouterr().err
    assert "1 steps were skipped before, --max-skipped is 1" in err


def test_an_evaluation_that_is_not_finite_names_the_pairs_and_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from orpo_mlx.engine.pair_scorer import log_probs as good

    def spoiled(*arguments: Any, **options: Any) -> PairLogProbs:
        logps = good(*arguments, **options)
        assert isinstance(logps, PairLogProbs)
        return logps._replace(chosen=logps.chosen * mx.inf)

    monkeypatch.setattr("orpo_mlx.training.evaluating.evaluation.log_probs", spoiled)
    assert main([*flags(settings), "--save-best", "--test-batches", "0"]) == 0
    assert "Warning: not finite at step 3 on 6 valid pairs: " in capsys.readouterr().out
    folder = Path(settings["adapter_path"])
    assert [row["logps/chosen"] for row in records(folder) if row["split"] == "valid"] == [None, None]
    assert_no_nan(folder)
    assert not (folder / "best").exists()


@pytest.mark.parametrize("most", [0.1, 1.0, 5.0, 100.0])
def test_clipping_gives_the_norm_asked_for_and_never_more(most: float) -> None:
    # PyTorch: gradients times min(1, most / (norm + 1e-6)).
    assert clip_factor(5.0, most) == pytest.approx(min(1.0, most / (5.0 + 1e-6)))
    assert 5.0 * clip_factor(5.0, most) <= most or clip_factor(5.0, most) == 1.0


def test_the_norm_in_the_metrics_is_the_gradients_before_clipping(settings: dict[str, Any]) -> None:
    run = make_run(settings)
    pairs = run.splits["train"].pairs[:2]
    _, _, gradients = run.functions.micro_batch(micro_batch_inputs(run, pairs, pairs))
    expected = math.sqrt(sum(float(np.square(np.array(value, np.float64)).sum()) for value in gradients.values()))
    assert optimiser_step(run, pairs, 1).means()["grad_norm"] == pytest.approx(expected, rel=1e-5)
    clipping = {**settings, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": expected / 10}
    run = make_run(clipping)
    before = trainable(run)
    assert optimiser_step(run, pairs, 1).means()["grad_norm"] == pytest.approx(expected, rel=1e-5)
    moved = math.sqrt(sum(float(np.square(value - before[name]).sum()) for name, value in trainable(run).items()))
    assert moved == pytest.approx(expected / 10, rel=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_never_applied(settings: dict[str, Any], where: str) -> None:
    run = make_run(settings)
    pairs = run.splits["train"].pairs[:2]
    before = trainable(run)
    good = run.method.loss

    def spoiled(logps: PairLogProbs) -> LossOutput:
        # sqrt(0) is 0 and its gradient infinite.
        term = logps.chosen * mx.nan if where == "loss" else mx.sqrt(logps.chosen - mx.stop_gradient(logps.chosen))
        output: LossOutput = good(logps)
        return output._replace(losses=output.losses + term)

    method = run.method._replace(loss=spoiled)
    run.functions = StepFunctions(run.scorer, run.memory, method, run.optimizer)
    with pytest.raises(
        TrainingError, match=r"step 7: the loss is .* and the gradient's norm (nan|inf) on .*train.jsonl:1"
    ):
        optimiser_step(run, pairs, 7)
    for name, value in trainable(run).items():
        assert np.array_equal(value, before[name])

"""The loop and its command line, on a tiny model."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as mlx_lm_load

from orpo_mlx.cli.train import main
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import ConfigError, DeviceError, TrainingError
from orpo_mlx.losses.registry import METHODS
from orpo_mlx.memory.predict import Prediction
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.train import train
from orpo_mlx.training.data_order import total_steps
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.references.reference import ReferenceLogProbs
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.gradients import step_gradient
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.training.steps.step_functions import StepFunctions
from orpo_mlx.types import Batch, LossOutput, PairLogProbs, TokenizedPair
from tests.conftest import make_pairs, write_id_rows, write_model_folder, write_rows
from tests.helpers.quiet_training import run_quietly
from tests.test_errors import IGNORED, OUT_OF_MEMORY, TIMEOUT


def flags(settings: dict[str, Any]) -> list[str]:
    """The settings as a command line."""
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    off = {"--memory-check": "--no-memory-check", "--report": "--no-report"}
    return [off.get(word, word) for word in words if word != "False"]


def trainable(run: Run) -> dict[str, Any]:
    return {name: np.array(value) for name, value in adapter_weights(run.loaded.model).items()}


def rows(settings: dict[str, Any], split: str | None = None) -> list[dict[str, Any]]:
    lines = (Path(settings["adapter_path"]) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if split in (None, row["split"])]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_its_train_split(settings: dict[str, Any], method: str) -> None:
    # Their gradients grow exponentially as the chosen side falls below the reference: at 1e-2 rounding decides the end.
    rate = 3e-3 if method in ("dpo_alpha", "dpo_forward_kl") else 1e-2
    metrics = run_quietly({**settings, "method": method, "iters": 30, "learning_rate": rate, "shuffle": False})
    reports = rows(settings, "train")
    assert [row["step"] for row in reports] == list(range(1, 31))
    first, last = (np.mean([row["loss"] for row in part]) for part in (reports[:3], reports[-3:]))
    # The weights of wpo are next to nothing on texts that a random model would never sample, and rise as it learns.
    assert last < first - 0.1 or method == "wpo"
    if method != "sft":
        assert np.mean([row["rewards/accuracies"] for row in reports[-3:]]) > 0.8
    assert set(metrics) == {"valid", "test"}


def test_what_is_written(settings: dict[str, Any]) -> None:
    run_quietly(settings)
    folder = Path(settings["adapter_path"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapters.safetensors", "checkpoints", "metrics.jsonl", "run.json",
        "train.lock",
    ]  # fmt: skip
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3
    assert record["method_parameters"] == {"orpo": {"beta": 0.1}}
    assert record["data"]["train"]["pairs"] == 6
    assert len(record["data"]["train"]["sha256"]) == 64
    assert record["versions"]["mlx"] == version("mlx")
    keys = {
        "step", "split", "loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
        "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    }  # fmt: skip
    for row in rows(settings):
        assert keys <= set(row)
    assert [row["step"] for row in rows(settings, "valid")] == [0, 3]
    assert [row["step"] for row in rows(settings, "test")] == [0, 3]
    for row in rows(settings, "train"):
        assert row["pair_tokens_per_s"] > 0
        assert row["peak_memory_gib"] > 0
        assert row["learning_rate"] == pytest.approx(1e-3)


def test_mlx_lm_loads_the_adapters_as_they_are(settings: dict[str, Any]) -> None:
    run_quietly(settings)
    model, tokenizer = mlx_lm_load(settings["model"], adapter_path=settings["adapter_path"])[:2]
    base = mlx_lm_load(settings["model"])[0]
    ids = mx.array([tokenizer.encode("hello")])
    assert not mx.allclose(model(ids), base(ids), atol=1e-3).item()


@pytest.mark.parametrize("method", ["orpo", "dpo"])
def test_same_seed_same_losses_bit_for_bit(settings: dict[str, Any], method: str, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        run_quietly({**settings, "method": method, "seed": seed, "lora_parameters": {"dropout": 0.1}})
        losses.append([row["loss"] for row in rows(settings)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def make_run(settings: dict[str, Any], **changes: Any) -> Run:
    return prepare(make_config({**settings, **changes}))


@pytest.mark.parametrize("start", ["fresh", "warm", "full", "dora"])
def test_the_first_dpo_loss_is_ln_2(settings: dict[str, Any], start: str, tmp_path: Path) -> None:
    if start == "warm":
        run_quietly({**settings, "adapter_path": str(tmp_path / "first"), "learning_rate": 0.1})
        settings["resume_adapter_file"] = str(tmp_path / "first")
    fine_tune_type = start if start in ("full", "dora") else "lora"
    run_quietly({**settings, "method": "dpo", "fine_tune_type": fine_tune_type})
    assert rows(settings, "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows(settings, "valid")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows(settings, "train")[-1]["loss"] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["orpo", "dpo"])
def test_gradient_checkpointing_changes_memory_not_numbers(settings: dict[str, Any], method: str) -> None:
    losses = []
    for flag in (False, True, False):
        run_quietly({**settings, "method": method, "grad_checkpoint": flag})
        losses.append([row["loss"] for row in rows(settings)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[2] == losses[0]


def test_training_on_from_an_adapter_starts_where_it_ended(settings: dict[str, Any], tmp_path: Path) -> None:
    run_quietly({**settings, "adapter_path": str(tmp_path / "first"), "learning_rate": 0.05})
    end = rows({"adapter_path": str(tmp_path / "first")}, "valid")[-1]["loss"]
    run_quietly({**settings, "resume_adapter_file": str(tmp_path / "first" / "adapters.safetensors")})
    assert rows(settings, "valid")[0]["loss"] == pytest.approx(end, rel=1e-6)


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


def fail_at(step: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gradient of that step raise."""
    calls = itertools.count(1)

    def gradient(*args: Any) -> Any:
        if next(calls) == step:
            raise error
        return step_gradient(*args)

    monkeypatch.setattr("orpo_mlx.training.steps.step.step_gradient", gradient)


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted: step 2 is saved, go on with"),
        (
            RuntimeError("[METAL] out\nof memory."),
            2,
            "error: step 3: [METAL] out of memory; the GPU failed: start the command again; "
            "step 2 is saved, go on with",
        ),
    ],
)
def test_a_run_that_ends_early_saves_what_it_learned(
    settings: dict[str, Any],
    tmp_path: Path,
    error: BaseException,
    status: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_quietly({**settings, "iters": 2, "adapter_path": str(tmp_path / "two steps")})
    fail_at(3, error, monkeypatch)
    assert main([*flags(settings), "--iters", "5"]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert expected in err
    assert f"orpo-mlx train --resume --adapter-path {settings['adapter_path']}" in err
    saved, two_steps = (
        (Path(folder) / "adapters.safetensors").read_bytes()
        for folder in (settings["adapter_path"], tmp_path / "two steps")
    )
    assert saved == two_steps


@pytest.mark.parametrize("runs", [mx.cpu, None])
def test_after_an_error_of_the_gpu_the_last_step_is_saved_on_the_cpu(
    settings: dict[str, Any], runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    streams: list[Any] = []

    @contextmanager
    def stream(where: Any) -> Iterator[None]:
        streams.append(where)
        yield
        streams.pop()

    def isfinite(array: mx.array) -> mx.array:
        if runs is None or runs not in streams:
            raise RuntimeError(IGNORED)
        return array == array

    fail_at(3, RuntimeError(TIMEOUT), monkeypatch)
    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(mx, "isfinite", isfinite)
    assert main([*flags(settings), "--iters", "5"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "kIOGPUCommandBufferCallbackErrorTimeout); a piece of work took the GPU too long: lower --micro-batch" in err
    assert ("step 2 is saved, go on with" in err) is (runs is not None)
    assert ("step 2 cannot be saved: [METAL]" in err) is (runs is None)


def test_the_gpus_errors_before_the_first_step_are_one_sentence(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(*_: Any, **__: Any) -> None:
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr("orpo_mlx.training.loop.evaluate_splits", evaluated)
    assert main(flags(settings)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ErrorOutOfMemory); memory has run out: lower --micro-batch-tokens, take --memory thrift, or cut" in err
    with pytest.raises(DeviceError, match="`micro_batch_tokens`"):
        run_quietly({**settings, "overwrite": True})


def test_an_interrupt_in_the_first_step_says_that_nothing_was_saved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(1, KeyboardInterrupt(), monkeypatch)
    assert main(flags(settings)) == 130
    assert "nothing was saved" in capsys.readouterr().err


@pytest.mark.parametrize(("info", "limits"), [({}, []), ({"max_recommended_working_set_size": 7}, [7])])
def test_memory_is_wired_only_where_the_device_names_a_size(
    info: dict[str, int], limits: list[int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", found.append)
    monkeypatch.setattr(mx, "set_cache_limit", lambda _: None)
    run_quietly({**settings, "iters": 1})
    assert found == limits


def test_steps_of_a_run() -> None:
    assert total_steps(make_config({"iters": 7}), 100) == 7
    assert total_steps(make_config({"epochs": 1}), 10) == 3
    assert total_steps(make_config({"epochs": 1.5, "batch_size": 2, "grad_accumulation_steps": 2}), 8) == 3
    for epochs in (1.7e308, 1e19):
        with pytest.raises(ConfigError, match=r"^`epochs`: found 1.*e\+.*, expected passes of fewer than 2\^63 steps"):
            total_steps(make_config({"epochs": epochs}), 100)


def test_saves_along_the_way_and_a_schedule(settings: dict[str, Any]) -> None:
    schedule = {"name": "linear_schedule", "arguments": [1e-3, 0.0, 4]}
    run_quietly({**settings, "iters": 4, "save_every": 2, "steps_per_eval": 2, "lr_schedule": schedule})
    saved = sorted(path.name for path in (Path(settings["adapter_path"]) / "checkpoints").iterdir())
    assert saved == ["step-0000002", "step-0000004"]
    assert [row["step"] for row in rows(settings, "valid")] == [0, 2, 4]
    rates = [row["learning_rate"] for row in rows(settings, "train")]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]


def test_a_file_as_data_trains_without_validation(settings: dict[str, Any], data: Path) -> None:
    metrics = run_quietly({**settings, "data": str(data / "train.jsonl")})
    assert metrics == {}
    assert {row["split"] for row in rows(settings)} == {"train"}


def test_text_rows_and_sample_replies(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"prompt": "Say \x1b[31mred", "chosen": "Yes.", "rejected": "Well, perhaps."}
    write_rows(tmp_path / "text" / "train.jsonl", [{**text, "prompt": f"{text['prompt']} {n}"} for n in range(4)])
    argv = flags(settings)
    assert main([*argv, "--data", str(tmp_path / "text"), "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("before  [") == out.count("after   [") == 2
    assert "\x1b" not in out
    assert "No valid split: training without validation." in out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--learning-rate", "-1"], "--learning-rate: found '-1', expected a number greater than 0."),
        (["--method", "orop"], "did you mean orpo?"),
        (["--model", "./nowhere"], "--model ./nowhere: no such file or folder"),
        (["--method", "sft", "--beta", "1"], "--beta: method sft has no such parameter"),
        (["--resume-adapter-file", "nowhere"], "--resume-adapter-file nowhere: no such adapter file"),
        (["--precompute-reference"], "--precompute-reference: method orpo compares with no reference"),
        (["--num-layers", "9"], "--num-layers 9: the model has 2 layers"),
        (["--max-seq-length", "2"], "no pair can be used (6 longer than --max-seq-length 2)"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    settings: dict[str, Any], changes: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(settings)
    assert main([*argv, *changes]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("orpo-mlx train: error: ")
    assert expected in err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "has no rows"),
        ('{"prompt": "a"', "rows.jsonl:7: invalid JSON"),
        ('{"prompt": "a", "chosen": "b"}', "rows.jsonl:7: the row has no 'rejected'"),
    ],
)
def test_bad_rows_are_named(
    settings: dict[str, Any], tmp_path: Path, line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}\n'
    (tmp_path / "rows.jsonl").write_text(6 * good + line + "\n" if line else "")
    argv = flags(settings)
    assert main([*argv, "--data", str(tmp_path / "rows.jsonl")]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr_schedule: {name: no_such}", "is not a schedule of mlx-lm"),
        ("lr_schedule: {name: cosine_decay, arguments: [fast, 3]}", "is not a schedule of mlx-lm"),
        ("lr_schedule: {arguments: [1]}", "is not a schedule of mlx-lm"),
        ("optimizer_config: {adamw: {momentums: 3}}", "optimizer_config.adamw"),
        ("optimizer: adamx", "did you mean"),
    ],
)
def test_a_config_that_does_not_fit_the_libraries(
    settings: dict[str, Any], tmp_path: Path, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    # As a flag it would take the place of the schedule.
    del settings["learning_rate"]
    assert main([*flags(settings), "-c", str(tmp_path / "config.yaml")]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_an_adapter_path_that_is_a_file(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    argv = flags(settings)
    assert main([*argv, "--adapter-path", str(tmp_path / "file")]) == 2
    assert "a file; give a folder" in capsys.readouterr().err


def test_a_token_outside_the_vocabulary(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt_ids": [1], "chosen_ids": [259], "rejected_ids": [3]}])
    argv = flags(settings)
    assert main([*argv, "--data", str(path)]) == 2
    assert "rows.jsonl:1: token id 259 is outside the model's vocabulary of 259" in capsys.readouterr().err


def test_a_model_folder_without_a_tokenizer_trains_on_ids(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "bare", tokenizer=False)
    assert set(run_quietly({**settings, "model": str(folder)})) == {"valid", "test"}


def test_the_module_runs_as_a_program(settings: dict[str, Any]) -> None:
    argv = flags(settings)
    done = subprocess.run([sys.executable, "-m", "orpo_mlx.train", *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Held-out pairs, before and after training" in done.stdout
    assert "Adapters, metrics and settings are in" in done.stdout


def count_reference_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of every reference forward, as they come."""
    passes: list[int] = []
    compute = ReferenceLogProbs._compute

    def counted(self: ReferenceLogProbs, pairs: Sequence[TokenizedPair], batch: Batch) -> None:
        passes.append(len(pairs))
        compute(self, pairs, batch)

    monkeypatch.setattr(ReferenceLogProbs, "_compute", counted)
    return passes


@pytest.mark.parametrize("start", ["fresh", "warm", "full"])
def test_a_reference_is_computed_once_for_all_epochs_and_runs(
    settings: dict[str, Any], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if start == "warm":
        run_quietly({**settings, "adapter_path": str(tmp_path / "first")})
        settings["resume_adapter_file"] = str(tmp_path / "first")
    settings |= {"method": "dpo", "iters": 7, "fine_tune_type": "full" if start == "full" else "lora"}
    passes = count_reference_passes(monkeypatch)
    run_quietly(settings)
    # The held-out pairs are met before the first step, where the policy is the reference.
    assert sum(passes) == (6 if start == "fresh" else 18)
    first = rows(settings)
    passes.clear()
    run_quietly({**settings, "adapter_path": str(tmp_path / "second")})
    assert passes == []
    numbers = [
        [{**row, "pair_tokens_per_s": 0, "peak_memory_gib": 0} for row in table]
        for table in (first, rows({"adapter_path": str(tmp_path / "second")}))
    ]
    assert numbers[0] == numbers[1]
    run_quietly({**settings, "seed": 1, "beta": 0.5})
    assert sum(passes) == 0


def test_precomputing_takes_the_pairs_to_come_and_changes_no_number(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    settings |= {"method": "dpo", "iters": 2, "val_batches": 1, "test_batches": 0}
    run_quietly(settings)
    first = [row["loss"] for row in rows(settings)]
    shutil.rmtree(own_cache)
    passes = count_reference_passes(monkeypatch)
    run_quietly({**settings, "precompute_reference": True})
    assert passes == [2, 2, 2]
    assert [row["loss"] for row in rows(settings)] == first


def test_a_run_that_ends_early_keeps_its_reference(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"method": "dpo", "val_batches": 0, "test_batches": 0}
    with monkeypatch.context() as patch:
        fail_at(3, KeyboardInterrupt(), patch)
        assert main(flags(settings)) == 130
    passes = count_reference_passes(monkeypatch)
    assert main([*flags(settings), "--overwrite"]) == 0
    assert sum(passes) == 2
    assert "4 pairs have reference log-probs from earlier runs with this model;" in capsys.readouterr().out


def test_a_damaged_reference_is_computed_again(
    settings: dict[str, Any], own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["method"] = "dpo"
    run_quietly(settings)
    first = [row["loss"] for row in rows(settings)]
    (file,) = (own_cache / "reference").iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    assert main(flags(settings)) == 0
    assert f"{file} is damaged" in capsys.readouterr().out
    assert [row["loss"] for row in rows(settings)] == first


def test_nothing_is_kept_where_the_cache_is_off(
    settings: dict[str, Any], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPO_MLX_CACHE", "off")
    run_quietly({**settings, "method": "dpo"})
    assert not own_cache.exists()


def test_the_prediction_comes_first_and_changes_no_number(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings["lora_parameters"] = {"dropout": 0.1}
    run_quietly(settings)
    first = [row["loss"] for row in rows(settings)]
    train(make_config({**settings, "memory_check": True}))
    assert [row["loss"] for row in rows(settings)] == first
    assert re.search(r"^Predicted peak 0\.0\d GiB", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(("share", "expected"), [(2.0, "Predicted"), (0.95, "Warning: a step is"), (0.5, "refused")])
def test_a_run_beyond_the_device_is_warned_of_or_refused(
    settings: dict[str, Any],
    share: float,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peak = Prediction(1.0, 0.5, 0.25, 0.125, 0.125, 0.0)
    monkeypatch.setattr("orpo_mlx.memory.choose_mode.predict", lambda *_: peak)
    monkeypatch.setattr("orpo_mlx.memory.choose_mode.device_working_set", lambda: share * peak.peak)
    argv = [word for word in flags(settings) if word != "--no-memory-check"]
    assert main(argv) == (2 if expected == "refused" else 0)
    out, err = capsys.readouterr()
    if expected == "refused":
        assert "a step is predicted to take 2.00 GiB, this device recommends 1.00 GiB at most; orpo-mlx fit" in err
        assert main([*argv, "--no-memory-check"]) == 0
    else:
        assert expected in out
        assert ("Warning" in out) == (expected != "Predicted")
        assert "Predicted peak 2.00 GiB (weights 1.00, adapters 0.50, optimiser 0.25" in out


def test_a_run_whose_peak_cannot_be_predicted_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("orpo_mlx.memory.predict.build", build)
    assert main([word for word in flags(settings) if word != "--no-memory-check"]) == 0
    expected = "The peak of memory cannot be predicted: a model like this one with 2 layers cannot be run (list index"
    assert expected in capsys.readouterr().out


def test_bad_rows_are_left_out_and_listed(
    settings: dict[str, Any], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "train.jsonl"
    path.write_text(path.read_text() + '{"prompt": \n{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}\n')
    assert main(flags(settings)) == 2
    assert f"{path}:7: invalid JSON" in capsys.readouterr().err
    assert main([*flags(settings), "--skip-bad-rows"]) == 0
    out = capsys.readouterr().out
    assert "train: 6 pairs from" in out
    assert "1 left out: not a usable row, 1 left out: chosen and rejected are the same tokens" in out
    folder = Path(settings["adapter_path"])
    first, second = (folder / "left_out.txt").read_text().splitlines()
    assert first.startswith(f"{path}:7: invalid JSON")
    assert second == f"{path}:8: chosen and rejected are the same tokens."
    record = json.loads((folder / "run.json").read_text())["data"]["train"]
    assert (record["rows"], record["pairs"], record["shape"]) == (8, 6, "token ids")
    assert record["left_out"] == {"bad_row": 1, "equal_sides": 1}
    write_id_rows(path, make_pairs(6))
    assert main(flags(settings)) == 0
    assert not (folder / "left_out.txt").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_order_is_saved_with_the_adapters_and_restored(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    seen: list[list[str]] = []
    step = optimiser_step

    def recorded(run: Run, pairs: Any, number: int) -> Any:
        if interrupted and len(seen) == 2:
            raise KeyboardInterrupt
        seen.append([pair.location for pair in pairs])
        return step(run, pairs, number)

    monkeypatch.setattr("orpo_mlx.training.loop.optimiser_step", recorded)
    run_quietly({**settings, "iters": 8, "adapter_path": str(tmp_path / "whole")}) if not interrupted else None
    whole, seen[:] = list(seen), []
    first = {**settings, "adapter_path": str(tmp_path / "first"), "iters": 2}
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            run_quietly({**first, "iters": 8})
        interrupted = False
    else:
        run_quietly(first)
    run_quietly({**settings, "iters": 6, "resume_adapter_file": str(tmp_path / "first")})
    # 6 pairs, 2 a step: two and two thirds epochs, each pair once in each of the whole ones.
    assert [len({location for step in seen[start : start + 3] for location in step}) for start in (0, 3)] == [6, 6]
    assert not whole or seen == whole
    resumed, seen[:] = list(seen), []
    run_quietly({**settings, "iters": 2, "seed": 5, "resume_adapter_file": str(tmp_path / "first")})
    fresh, seen[:] = list(seen), []
    run_quietly({**settings, "iters": 2, "seed": 5})
    assert fresh == seen
    assert len(resumed) == 8
    # In place, over the file it goes on from, with a save at every step.
    seen.clear()
    for _ in range(2):
        run_quietly(
            {**first, "save_every": 1, "iters": 2, "overwrite": True, "resume_adapter_file": str(tmp_path / "first")}
        )
    assert seen == resumed[2:6]


def test_what_is_in_the_way_of_results_is_said_before_anything_is_trained(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(settings["adapter_path"])
    # What a run writes is known from one that wrote it.
    with_report = {name: value for name, value in settings.items() if name != "report"}
    assert main(flags({**with_report, "iters": 1})) == 0
    written = {path.name: path.is_dir() for path in folder.iterdir() if path.name != "train.lock"}
    assert {"adapters.safetensors", "report.html", "metrics.jsonl", "checkpoints"} <= written.keys()
    capsys.readouterr()
    for name, holds_files in written.items():
        other = folder.with_name(f"in the way of {name}")
        other.mkdir()
        (other / name).touch() if holds_files else (other / name).mkdir()
        assert main(flags({**settings, "adapter_path": str(other), "model": "not read"})) == 2
        printed = capsys.readouterr()
        assert f"{other / name}: is {'no' if holds_files else 'a'} folder, where a run" in printed.err
        assert printed.out == ""
    earlier = folder / "checkpoints" / "step-0000001"
    (folder / "best").mkdir()
    assert main(flags(settings)) == 2
    assert f"{folder / 'best'}: is a folder, where a run has a link" in capsys.readouterr().err
    assert earlier.is_dir()
    deep = {**settings, "adapter_path": "a/" * 1500}
    assert main(flags(deep)) == 2
    assert capsys.readouterr().err.count("\n") == 1

"""Scoring pairs from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.cli.score import main
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from tests.conftest import make_model, make_pairs, model_config, write_id_rows, write_model_folder, write_rows
from tests.engine.test_pair_scorer import oracle_logps
from tests.helpers.tuned_adapters import tuned_adapters

PARITY = ["gemma2", "llama_tied", "phi3", "qwen2", "granite", "qwen3_moe"]


def run(tmp_path: Path, *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--output", str(tmp_path / "scores.jsonl")]) == 0
    return [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]


def test_rows_are_in_input_order_and_agree_with_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path / "bare", tokenizer=False)
    pairs = make_pairs(11)
    data = write_id_rows(tmp_path / "rows.jsonl", pairs)
    rows = run(tmp_path, "--model", str(folder), "--data", str(data), "--per-token", "--batch-size", "4")
    model = make_model()
    assert [row["index"] for row in rows] == list(range(11))
    for row, pair in zip(rows, pairs, strict=True):
        means = {}
        for side in ("chosen", "rejected"):
            ids = getattr(pair, f"{side}_ids")
            expected = oracle_logps(model, pair.prompt_ids, ids)
            np.testing.assert_allclose(row[f"{side}_token_logps"], expected, atol=2e-5)
            assert row[f"{side}_logps"] == pytest.approx(expected.sum(), abs=1e-4)
            assert row[f"{side}_tokens"] == len(ids)
            means[side] = expected.mean()
            assert row[f"{side}_mean_logps"] == pytest.approx(means[side], abs=2e-5)
        assert row["margin"] == pytest.approx(means["chosen"] - means["rejected"], abs=4e-5)
        assert row["prefers_chosen"] == (row["margin"] > 0)
    wins = sum(row["prefers_chosen"] for row in rows)
    assert f"11 pairs: chosen preferred in {wins / 11:.1%}" in capsys.readouterr().out


def test_token_logps_are_left_out_unless_asked_for(tmp_path: Path, model_folder: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    (row,) = run(tmp_path, "--model", str(model_folder), "--data", str(data))
    assert "chosen_token_logps" not in row


def test_a_row_for_each_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path / "bare", tokenizer=False)
    rated: dict[str, Any] = {"prompt_ids": [5, 6, 7], "completion_ids": [[8], [9, 10], [11, 3, 4]], "scores": [2, 3, 1]}
    given: list[dict[str, Any]] = [rated, {"prompt_ids": [5, 6], "completion_ids": [9, 9], "label": "no"}]
    data = write_rows(tmp_path / "rows.jsonl", given)
    ranked, labelled = run(tmp_path, "--model", str(folder), "--data", str(data), "--labels", "yes,no", "--per-token")
    model = make_model()
    for row, source in ((ranked, rated["completion_ids"]), (labelled, [[9, 9]])):
        prompt = given[row["index"]]["prompt_ids"]
        for logps, ids, total in zip(row["token_logps"], source, row["logps"], strict=True):
            expected = oracle_logps(model, tuple(prompt), tuple(ids))
            np.testing.assert_allclose(logps, expected, atol=2e-5)
            assert total == pytest.approx(expected.sum(), abs=1e-4)
    assert (ranked["scores"], ranked["tokens"], labelled["scores"]) == ([2.0, 3.0, 1.0], [1, 2, 3], [0.0])
    assert ranked["margin"] == pytest.approx(ranked["mean_logps"][1] - ranked["mean_logps"][2])
    assert (labelled["margin"], labelled["prefers_best"]) == (None, None)
    assert "1 groups: best preferred in" in capsys.readouterr().out
    assert main(["--model", str(folder), "--data", str(data), "--output", str(tmp_path / "x")]) == 2
    assert "'label': found string 'no'" in capsys.readouterr().err


def test_adapters_change_the_scores(tmp_path: Path, model_folder: Path) -> None:
    data = write_id_rows(tmp_path / "rows.jsonl", make_pairs(3))
    lora = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    model = make_model()
    add_adapters(model, "lora", -1, lora)
    weights = {name: 0.1 * mx.random.normal(value.shape) for name, value in adapter_weights(model).items()}
    (tmp_path / "adapters").mkdir()
    mx.save_safetensors(str(tmp_path / "adapters" / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    model.load_weights(list(weights.items()), strict=False)
    base = run(tmp_path, "--model", str(model_folder), "--data", str(data))
    tuned = run(
        tmp_path, "--model", str(model_folder), "--data", str(data), "--adapter-path", str(tmp_path / "adapters")
    )
    assert tuned[0]["chosen_logps"] != pytest.approx(base[0]["chosen_logps"], abs=1e-3)
    pair = make_pairs(3)[0]
    expected = oracle_logps(model, pair.prompt_ids, pair.chosen_ids).sum()
    assert tuned[0]["chosen_logps"] == pytest.approx(expected, abs=1e-4)


def test_without_flags_the_run_that_train_wrote_is_scored(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tuned_adapters(tmp_path, model_folder, iters=1)
    monkeypatch.chdir(tmp_path)
    folder.rename("adapters")
    test = write_id_rows(tmp_path / "pairs" / "test.jsonl", make_pairs(3))
    run_file = tmp_path / "adapters" / "run.json"
    run_file.write_text(json.dumps({"settings": {"data": "pairs"}}))
    assert main([]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 3
    assert said.err.startswith(f"pairs/test.jsonl under {model_folder} with the adapters in adapters\n3 pairs: ")
    expected = run(tmp_path, "--model", str(model_folder), "--adapter-path", "adapters", "--data", str(test))
    assert [row["margin"] for row in rows] == [row["margin"] for row in expected]
    run_file.unlink()
    capsys.readouterr()
    assert main([]) == 2
    assert "--data: says which pairs are scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--data", "."], "is a folder; score takes one file"),
        (["--output", "/nowhere/scores.jsonl"], "--output /nowhere/scores.jsonl: cannot be written there"),
        (["--adapter-path", "/nowhere"], "--adapter-path /nowhere: holds neither adapters.safetensors"),
        (["--batch-size", "0"], "--batch-size: found 0"),
        (["--batch-size", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_input(
    tmp_path: Path, model_folder: Path, changes: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_id_rows(tmp_path / "rows.jsonl", make_pairs(2))
    argv = ["--model", str(model_folder), "--data", str(data), "--output", str(tmp_path / "scores.jsonl"), *changes]
    try:
        status: Any = main(argv)
    except SystemExit as caught:
        status = caught.code
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("\n") == 1
    assert expected in err


def test_rows_beyond_a_window_mlx_lm_ignores_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path / "gemma2", "gemma2", tokenizer=False)
    (folder / "config.json").write_text(json.dumps({**model_config("gemma2"), "sliding_window": 8}))
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4] * 6, "rejected_ids": [5]}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    assert main(["--model", str(folder), "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert "rows.jsonl:1: 9 tokens, but this model attends within a window of 8" in capsys.readouterr().err


@pytest.mark.parametrize("name", PARITY)
def test_score_agrees_with_pytorch(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "parity" / name
    reference = json.loads((folder / "reference.json").read_text())
    data = write_rows(tmp_path / "rows.jsonl", reference)
    rows = run(tmp_path, "--model", str(folder), "--data", str(data), "--per-token")
    for row, expected in zip(rows, reference, strict=True):
        for key in ("chosen_token_logps", "rejected_token_logps"):
            np.testing.assert_allclose(row[key], expected[key], rtol=0, atol=1e-4)

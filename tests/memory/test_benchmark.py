"""Methods measured side by side, on a tiny model, in processes of their own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.memory import benchmark_request, main
from orpo_mlx.config.checks import make_config
from orpo_mlx.data.batching import collate
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.memory import benchmark as memory_benchmark
from orpo_mlx.memory.benchmark import costs_table, measure, measure_methods
from tests.conftest import make_model, make_pairs
from tests.helpers.run_script import run_script

KEYS = {
    "peak_memory_gib",
    "active_memory_gib",
    "cache_memory_gib",
    "footprint_gib",
    "footprint_peak_gib",
    "step_s_median",
    "steps_s",
    "reference_s",
    "pair_tokens_per_s",
    "loss",
}


@pytest.fixture
def arguments(model_folder: Path, data: Path) -> list[str]:
    return ["--model", str(model_folder), "--data", str(data / "train.jsonl"), "--batch-size", "2"]


@pytest.mark.parametrize(("method", "reference"), [("sft", False), ("dpo", True)])
def test_what_is_measured(settings: dict[str, Any], method: str, reference: bool) -> None:
    result = measure(make_config({**settings, "method": method, "shuffle": False, "learning_rate": 1e-12}))
    assert set(result) == KEYS
    assert len(result["steps_s"]) == 3
    assert (result["reference_s"] > 0) == reference
    assert result["peak_memory_gib"] > result["active_memory_gib"] > 0
    # Three batches of two are the six pairs of the file; the weights have hardly moved.
    pairs = make_pairs(6)
    assert result["pair_tokens_per_s"] == pytest.approx(sum(p.pair_tokens for p in pairs) / sum(result["steps_s"]))
    nll = pair_logps(PairScorer(make_model()), collate(pairs)).nll.mean().item()
    assert result["loss"] == pytest.approx(math.log(2) if reference else nll, rel=1e-5)


def test_the_script(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "dpo,orpo", "--iters", "1", "--max-seq-length", "99", "--json", str(tmp_path / "out.json")]
    assert run_script("compare_memory.py", [*arguments, *words]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["method"] for row in record["methods"]] == ["dpo", "orpo"]
    assert all(set(row) >= KEYS for row in record["methods"])
    assert record["methods"][0]["settings"]["max_seq_length"] == 99
    assert set(record) == {"date", "machine", "versions", "methods"}
    header, rule, dpo, orpo = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in (header, rule, dpo, orpo)}) == 1
    assert orpo.startswith("| orpo   |")
    assert "(1.00x)" in orpo
    assert not list(tmp_path.glob("adapters*"))


def test_what_is_published_holds_figures_and_no_paths(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = dict.fromkeys(KEYS, 1.5)
    monkeypatch.setattr(memory_benchmark, "measure_in_a_process", lambda _: figures)
    assert main([*arguments, "--methods", "orpo,dpo", "--publish", str(tmp_path / "mine.json")]) == 0
    text = (tmp_path / "mine.json").read_text()
    assert str(tmp_path) not in text
    assert str(Path(arguments[1]).parent) not in text
    record = json.loads(text)
    assert [row["method"] for row in record["methods"]] == ["orpo", "dpo"]
    assert all(row["peak_memory_gib"] == 1.5 and "settings" not in row for row in record["methods"])
    assert (record["settings"]["model"], record["settings"]["data"]) == ("llama", "train.jsonl")
    assert record["settings"]["batch_size"] == 2
    assert record["versions"]["mlx"]
    capsys.readouterr()
    assert main([*arguments, "--publish", "no/where.json"]) == 2
    assert "--publish no/where.json: cannot be written there" in capsys.readouterr().err


def row(method: str, peak: float) -> dict[str, Any]:
    return {"method": method, "memory": "fast", **dict.fromkeys(KEYS, 1.0), "peak_memory_gib": peak}


def test_ratios_are_to_orpo_or_else_to_the_first() -> None:
    def peaks(*rows: dict[str, Any]) -> list[str]:
        return [line.split("|")[3].strip() for line in costs_table(rows).splitlines()[2:]]

    assert peaks(row("dpo", 3.0), row("orpo", 2.0)) == ["3.00 (1.50x)", "2.00 (1.00x)"]
    assert peaks(row("dpo", 3.0), row("sft", 1.5)) == ["3.00 (1.00x)", "1.50 (0.50x)"]
    assert peaks({"method": "orpo", "memory": "fast", "error": "killed by SIGKILL"}, row("dpo", 3.0)) == [
        "killed by SIGKILL",
        "3.00 (1.00x)",
    ]
    assert peaks({"method": "orpo", "memory": "fast", "error": "killed by SIGKILL"}) == ["killed by SIGKILL"]


def test_a_process_that_dies_is_named_and_the_rest_go_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\ncase "$*" in *\'"orpo"\'*) kill -9 $$;; *\'"sft"\'*) echo odd: no memory >&2; exit 1;; esac\n'
        f"echo '{json.dumps(dict.fromkeys(KEYS, 1.5))}'\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    json_file = tmp_path / "out.json"
    words = ["--methods", "orpo,sft,cpo", "--iters", "1", "--json", str(json_file)]
    assert main([*arguments, *words]) == 2
    out = capsys.readouterr()
    sentence = "the process of orpo (killed by SIGKILL), sft (odd: no memory) died before it was measured."
    assert out.err.splitlines()[-1] == f"{memory_benchmark.PROG}: error: {sentence}"
    assert "| cpo    |" in out.out
    errors = [row.get("error") for row in json.loads(json_file.read_text())["methods"]]
    assert errors == ["killed by SIGKILL", "odd: no memory", None]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "orop"], "did you mean orpo?"),
        (["--methods", "orpo,"], "--method"),
        (["--method", "orpo"], "--method: this command measures several"),
        (["--method=orpo"], "--method: this command measures several"),
        (["--test"], "--test: this command is about the steps of a new training; leave it out."),
        (["--resume"], "--resume: this command is about the steps of a new training; leave it out."),
        (["--iters", "0"], "--iters: found '0'"),
        (["--modes", "fast,slow"], "--memory: found 'slow', expected one of auto, fast, balanced, thrift, plain"),
        (["--modes", "fast", "--memory", "thrift"], "--memory: several modes are measured"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--odd", "1"], "unrecognized arguments: --odd"),
        (["--json", "no/where.json"], "--json no/where.json: cannot be written there"),
        (["--methods", "orpo", "--model", "./nowhere"], "--model ./nowhere: no such file or folder."),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([*arguments, *words])
    except SystemExit as left:
        status = int(str(left.code))
    assert status == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{memory_benchmark.PROG}: error: ")
    assert last.count("error: ") == 1
    assert expected in last


def test_every_flag_of_train_holds_for_every_method(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def in_a_process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, "{}\n", "")

    monkeypatch.setattr(subprocess, "run", in_a_process)
    request = benchmark_request([*arguments, "--grad-checkpoint", "--no-shuffle", "--seed", "7"])
    record = measure_methods(request.configs)
    assert [row["method"] for row in record["methods"]] == ["orpo", "dpo"]
    for row, settings in zip(record["methods"], asked, strict=True):
        assert (settings["grad_checkpoint"], settings["seed"], settings["iters"]) == (True, 7, 3)
        assert settings["shuffle"] is False
        # But for the folder, which is gone afterwards.
        assert row["settings"] == {**settings, "adapter_path": row["settings"]["adapter_path"]}
        assert not Path(settings["adapter_path"]).exists()


def test_each_method_in_each_mode(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_benchmark, "measure_in_a_process", lambda _: {})
    rows = measure_methods(benchmark_request([*arguments, "--modes", "plain,thrift"]).configs)["methods"]
    assert [(row["method"], row["memory"]) for row in rows] == [
        ("orpo", "plain"),
        ("orpo", "thrift"),
        ("dpo", "plain"),
        ("dpo", "thrift"),
    ]

"""Cells run once, go on where they were, and are of one comparison."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.compare import main, parse_plan
from orpo_mlx.compare import runner
from orpo_mlx.compare.plan import PROG
from orpo_mlx.compare.report import markdown
from orpo_mlx.errors import ConfigError, TrainingError
from tests.conftest import write_rows
from tests.helpers.small_comparison import here, quiet, words, write_text_data

TIMED = (
    "training_s",
    "reference_s",
    "step_s_median",
    "pair_tokens_per_s",
    "peak_memory_gib",
    "cache_memory_gib",
    "footprint_peak_gib",
)
ONE = ("--methods", "orpo,dpo", "--seeds", "1", "--learning-rates", "1e-2", "--steps", "2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_text_data(tmp_path / "data")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the cells that were run, in order."""
    titles: list[str] = []

    def note(spec: dict[str, Any], title: str, progress: Any) -> None:
        titles.append(title)
        here(spec, title, progress)

    monkeypatch.setattr(runner, "in_a_process", note)
    return titles


def run(argv: list[str]) -> dict[str, Any]:
    return runner.run_comparison(parse_plan(argv), argv, quiet())


def figures(results: dict[str, Any]) -> Any:
    """All that does not depend on the clock."""
    methods = []
    for arm in results["methods"]:
        summary = {key: value for key, value in arm["summary"].items() if key not in TIMED}
        curves = [[{**point, "seconds": 0} for point in curve] for curve in arm["curves"]]
        methods.append({**arm, "summary": summary, "curves": curves, "to_target": arm["to_target"]["steps"]})
    return results["base"], methods


def test_the_same_command_gives_the_same_and_runs_nothing_twice(
    tmp_path: Path, model_folder: Path, data: Path, ran: list[str]
) -> None:
    argv = words(tmp_path / "out", model_folder, data, *ONE)
    first = run(argv)
    assert ran == [
        "base judged",
        "orpo_seed0_lr0.01 trained",
        "dpo_seed0_lr0.01 trained",
        "orpo_seed0_lr0.01 judged",
        "dpo_seed0_lr0.01 judged",
    ]
    ran.clear()
    assert figures(run(argv)) == figures(first)
    assert ran == []
    file = tmp_path / "out" / "cells" / "dpo_seed0_lr0.01" / "test.json"
    # A judgement that a crash left half written, one that is none, and one of another cell that happens to bear its
    # name are done again; the training that is whole is not.
    for damaged in ('{"accuracy": 0.', "[]", file.read_text().replace('"seed": 0', '"seed": 7', 1)):
        file.write_text(damaged)
        assert figures(run(argv)) == figures(first)
        assert ran == ["dpo_seed0_lr0.01 judged"]
        ran.clear()
    anew = run(words(tmp_path / "new", model_folder, data, *ONE))
    assert figures(anew) == figures(first)
    assert len(ran) == 5
    ran.clear()
    more = run([*argv, "--methods", "orpo,dpo,sft"])
    assert figures(more)[1][:2] == figures(first)[1]
    assert ran == ["sft_seed0_lr0.01 trained", "sft_seed0_lr0.01 judged"]


def test_kto_stands_beside_dpo_on_the_same_pairs(
    tmp_path: Path, model_folder: Path, data: Path, ran: list[str]
) -> None:
    """While policy and reference are one, kto's gradient is dpo's times a number: Adam's first step is the same."""
    results = run(words(tmp_path / "out", model_folder, data, *ONE, "--methods", "kto,dpo"))
    kto, dpo = results["methods"]
    assert (kto["losses"][0][0], dpo["losses"][0][0]) == (pytest.approx(0.5), pytest.approx(math.log(2)))
    first, second = zip(kto["curves"][0], dpo["curves"][0], strict=True)
    assert first[0]["margin"] == pytest.approx(first[1]["margin"], rel=1e-4) != pytest.approx(results["base"]["margin"])
    assert second[0]["margin"] != pytest.approx(second[1]["margin"], rel=1e-3)
    assert kto["summary"]["pair_tokens"] == dpo["summary"]["pair_tokens"]
    lines = markdown(results).splitlines()
    for arm in (kto, dpo):
        (row,) = [line for line in lines if line.startswith(f"| {arm['name']} | 0.01 |")]
        assert f" {arm['summary']['margin']['mean']:.3f} | {arm['summary']['nll']['mean']:.3f} |" in row


def test_another_comparison_is_not_mixed_in(tmp_path: Path, model_folder: Path, data: Path, ran: list[str]) -> None:
    argv = words(tmp_path / "out", model_folder, data, *ONE, "--methods", "orpo")
    run(argv)
    with pytest.raises(ConfigError, match="whose batch_size is 2 and here 3; give another `output`"):
        run([*argv, "--batch-size", "3"])
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    write_rows(data / "train.jsonl", rows[::-1])
    with pytest.raises(TrainingError, match="was the data changed in between"):
        run([*argv, "--methods", "orpo,sft"])


def test_a_damaged_folder_is_one_sentence(tmp_path: Path, model_folder: Path, data: Path, ran: list[str]) -> None:
    argv = words(tmp_path / "out", model_folder, data, *ONE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"comparison\.json: "):
        run(argv)
    assert not ran


def test_what_a_comparison_holds(comparison: Path) -> None:
    results = json.loads((comparison / "results.json").read_text())
    arms = {arm["name"]: arm for arm in results["methods"]}
    assert list(arms) == ["orpo", "dpo", "dpo --reference copy"]
    copied, dpo = arms["dpo --reference copy"], arms["dpo"]
    assert copied["learning_rate"] == dpo["learning_rate"]
    assert copied["initial_adapter_sha256"] == dpo["initial_adapter_sha256"] == arms["orpo"]["initial_adapter_sha256"]
    assert copied["losses"] == [pytest.approx(run, rel=1e-4) for run in dpo["losses"]]
    assert len(dpo["grid"]) == 2
    assert not copied["grid"]
    assert {(row["name"], row["labels"]) for row in results["sanity"]} == {("orpo", "swapped"), ("orpo", "shuffled")}
    assert "<script>alert(" in results["base"]["replies"][0]["prompt"] + results["base"]["replies"][1]["prompt"]
    assert len(results["base"]["replies"]) == 6
    for arm in arms.values():
        assert arm["accuracy_interval"]["mean"] == pytest.approx(arm["summary"]["accuracy"]["mean"])
        assert arm["summary"]["kl_per_reply"]["mean"] > 0


def test_a_rate_that_fails_is_skipped_and_one_that_works_taken(
    tmp_path: Path, model_folder: Path, data: Path, ran: list[str]
) -> None:
    argv = words(tmp_path / "out", model_folder, data, "--methods", "orpo", "--seeds", "1")
    results = run([*argv, "--learning-rates", "1e30,1e-2"])
    arm = results["methods"][0]
    assert arm["learning_rate"] == 1e-2
    assert arm["sensitivity"] is None
    assert sum("failed" in found for found in arm["grid"]) == 1
    with pytest.raises(TrainingError, match="failed at every learning rate"):
        run([*argv, "--learning-rates", "1e30"])


@pytest.mark.parametrize(
    ("script", "error", "expected"),
    [
        ("kill -9 $$", TrainingError, "title: its process died \\(killed by SIGKILL\\); what is finished is kept"),
        ("echo odd: no memory >&2; exit 1", TrainingError, "its process died \\(odd: no memory\\)"),
        (f"echo '{PROG}: error: no such file.' >&2; exit 2", ConfigError, "^no such file.$"),
    ],
)
def test_a_process_that_dies_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], expected: str
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\necho noise\necho '{{\"progress\": 0.5}}'\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))
    shares: list[float] = []
    with pytest.raises(error, match=expected):
        runner.in_a_process({}, "title", shares.append)
    assert shares == [0.5]


def test_an_interruption_takes_the_process_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "python"
    lines = (
        "#!/bin/sh",
        f"trap 'echo gone > {tmp_path}/gone; exit 0' TERM",
        "echo '{\"progress\": 0.5}'",
        "sleep 20 >/dev/null 2>&1 &",
        "wait",
    )
    stand_in.write_text("\n".join(lines) + "\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))

    def interrupted(share: float) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)  # a shell's background job starts with it ignored
    with pytest.raises(KeyboardInterrupt):
        runner.in_a_process({}, "title", interrupted)
    assert (tmp_path / "gone").is_file()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--seconds", "3"], "give exactly one"),
        (["--model", "./nowhere"], "--model ./nowhere: no such file or folder."),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, model_folder: Path, data: Path, more: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(tmp_path / "out", model_folder, data), *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{PROG}: error: ")
    assert last.count("error: ") == 1
    assert expected in last
    shutil.rmtree(tmp_path / "out", ignore_errors=True)

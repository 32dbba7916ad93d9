"""A run's own report, from its metrics alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import orpo_mlx.train as training_module
from orpo_mlx.cli.report import PROG, main
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import ConfigError
from orpo_mlx.reporting.run_report import refresh_report, run_facts, write_report
from orpo_mlx.train import train
from orpo_mlx.training import loop as loop_module
from tests.helpers.small_comparison import quiet


def metrics(folder: Path, name: str, losses: list[float], **more: float) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": step, "split": "train", "loss": loss, **more} for step, loss in enumerate(losses, 1)
    ]
    rows += [
        {"step": step, "split": "valid", "loss": 1.0, "accuracies/mean_logps": share}
        for step, share in ((0, 0.25), (2, 0.75))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)[1:]]


def test_the_table_holds_the_figures(tmp_path: Path) -> None:
    one = metrics(tmp_path, "one", [3.0, 2.5, 2.0], pair_tokens_per_s=100.0, peak_memory_gib=1.5)
    two = metrics(tmp_path, "two", [1.0])
    paths = write_report([one, two], tmp_path)
    assert [path.name for path in paths] == ["report.html", "report.png"]
    page = paths[0].read_text()
    assert cells(page) == [
        ["one", "3", "3.0000 → 2.0000", "25.0% → 75.0%", "not measured", "100", "1.50"],
        ["two", "2", "1.0000", "25.0% → 75.0%", "not measured", "not measured", "not measured"],
    ]
    # Loss, accuracy and throughput; nobody reported a margin.
    assert page.count("<figure>") == 3
    assert paths[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_sample_replies_are_shown_as_text(tmp_path: Path) -> None:
    one, two = metrics(tmp_path, "one", [3.0]), metrics(tmp_path, "two", [1.0])
    row = {"step": 5, "prompt": "<b>who?</b>", "text": "<script>me</script>", "tokens": 3}
    (one / "samples.jsonl").write_text(json.dumps(row) + "\n")
    page = write_report([one], tmp_path)[0].read_text()
    assert "<h2>Sample replies</h2>" in page
    assert '<h3 tabindex="0" dir="auto">&lt;b&gt;who?&lt;/b&gt;</h3>' in page
    assert '<dt>step 5, 3 tokens</dt><dd tabindex="0" dir="auto">&lt;script&gt;me&lt;/script&gt;</dd>' in page
    page = write_report([one, two], tmp_path)[0].read_text()
    assert page.count("<h2>Sample replies: one</h2>") == page.count("Sample replies") == 1


def test_a_run_says_what_it_is(tmp_path: Path) -> None:
    one, two = metrics(tmp_path, "one", [3.0]), metrics(tmp_path, "two", [1.0])
    settings = {"method": "dpo", "model": "<m>", "data": "d/", "learning_rate": 1e-5, "batch_size": 4}
    (one / "run.json").write_text(json.dumps({"settings": settings, "started": "2026-11-26T10:00+00:00"}))
    known = ["dpo", "&lt;m&gt;", "d/", "1e-05", "4", "2026-11-26 10:00+00:00"]
    assert cells(write_report([one], tmp_path)[0].read_text())[0] == ["one", *known]
    named = (tmp_path / "report.png").read_bytes()
    assert cells(write_report([one, two], tmp_path)[0].read_text())[:2] == [
        ["one", *known],
        ["two", *["not recorded"] * 6],
    ]
    for text in ("{", "[]", '{"settings": 3}', '{"settings": {"learning_rate": "x"}, "started": 3}'):
        (one / "run.json").write_text(text)
        assert set(run_facts(one)) <= {"started"}
    write_report([one], tmp_path)
    assert (tmp_path / "report.png").read_bytes() != named


@pytest.mark.usefixtures("undrawn")
def test_runs_of_one_name_go_by_their_paths_and_torn_lines_are_told(tmp_path: Path) -> None:
    runs = [metrics(tmp_path / side, "run", [1.0]) for side in ("a", "b")]
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    page = write_report(runs, tmp_path)[0].read_text()
    assert [row[0] for row in cells(page)] == [str(run) for run in runs]
    assert "1 line without a report of metrics.jsonl passed over" in page


@pytest.mark.usefixtures("undrawn")
def test_train_writes_it(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def count(folder: Path) -> None:
        seen.append(len((folder / "metrics.jsonl").read_text().splitlines()))
        refresh_report(folder)
        assert (folder / "report.html").is_file() == bool(seen[-1])

    monkeypatch.setattr(training_module, "refresh_report", count)
    monkeypatch.setattr(loop_module, "refresh_report", count)
    train(
        make_config(
            {
                **settings,
                "report": True,
                "report_every": 1,
                "steps_per_report": 2,
                "iters": 3,
                "val_batches": 0,
                "test_batches": 0,
            }
        ),
        quiet(),
    )
    # After step 1, when nothing has been reported, after step 2, and at the end.
    assert seen == [0, 1, 2]
    folder = Path(settings["adapter_path"])
    rows = cells((folder / "report.html").read_text())
    assert rows[0][:2] == ["adapters", "orpo"]
    assert next(row[:2] for row in rows[1:] if row[:1] == ["adapters"]) == ["adapters", "3"]
    assert (folder / "report.png").is_file()


def test_no_report_contradicts_report_every() -> None:
    with pytest.raises(ConfigError, match="`report_every` asks for reports"):
        make_config({"report": False, "report_every": 3})


@pytest.mark.usefixtures("undrawn")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (metrics(tmp_path, name, [1.0]) for name in ("one", "two"))
    assert main([str(one)]) == 0
    assert capsys.readouterr().out.split() == [str(one / "report.html"), str(one / "report.png")]
    assert main([str(one), str(two), "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{0}/one", "{0}/two"], "--output: several runs are drawn together"),
        (["{0}/nowhere"], "metrics.jsonl: cannot be read"),
        (["{0}/one", "--output", "{0}/one/metrics.jsonl"], "cannot be made"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        metrics(tmp_path, name, [1.0])
    assert main([word.format(tmp_path) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{PROG}: error: ")
    assert expected in lines[0]

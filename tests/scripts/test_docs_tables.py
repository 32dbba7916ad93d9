"""Tables in the documents are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.errors import ConfigError, DataError
from scripts.docs_tables import DOCUMENTS, EXAMINED, add_results, regenerated, stale_documents
from scripts.tables.comparisons import TABLES
from tests.helpers.run_script import run_script

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = re.compile(r"<!-- results: ([a-z0-9_ -]+) -->")


def test_the_documents_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("docs_tables.py", ["--check"]) == 0
    assert capsys.readouterr() == ("", "")


def test_every_marker_has_an_end_and_every_result_a_marker() -> None:
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(MARK.findall(text)) == text.count("<!-- end of results -->")
        found += MARK.findall(text)
    assert "demo quality" in found
    assert "exercise claims" in found
    for file in (ROOT / "docs" / "results").glob("*.json"):
        assert any(mark.split()[0] == file.stem for mark in found), file
    for file in (ROOT / "docs" / "results" / "figures").glob("*.json"):
        assert f"figures {file.stem}" in found, file


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    for name in DOCUMENTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        marks = "".join(f"<!-- results: tiny {table} -->\nold\n<!-- end of results -->\ntext\n" for table in TABLES)
        (tmp_path / name).write_text(marks + "<!-- results: memory -->\nold\n<!-- end of results -->\n")
    return tmp_path


def test_tables_follow_their_results(documents: Path, comparison: Path) -> None:
    stale_documents(documents, write=True)
    text = (documents / "README.md").read_text()
    assert text.count("Not measured yet.") == len(TABLES)
    assert "None yet." in text
    assert "old" not in text
    target = add_results(comparison / "results.json", documents, "tiny", replies=True)
    assert stale_documents(documents, write=False) == list(DOCUMENTS)
    stale_documents(documents, write=True)
    assert stale_documents(documents, write=False) == []
    text = (documents / "README.md").read_text()
    assert "Not measured yet." not in text
    assert "&lt;script&gt;" in text
    assert "<script>" not in text
    results = json.loads(target.read_text())
    results["base"]["nll"] += 1
    target.write_text(json.dumps(results))
    assert stale_documents(documents, write=False) == list(DOCUMENTS)


def test_texts_stay_at_home_where_they_must(documents: Path, comparison: Path) -> None:
    target = add_results(comparison / "results.json", documents, "tiny", replies=False)
    assert "<script>" in (comparison / "results.json").read_text()
    assert "<script>" not in target.read_text()
    stale_documents(documents, write=True)


def test_published_memory_has_a_row_each(documents: Path) -> None:
    settings = {"model": "m", "batch_size": 2, "grad_accumulation_steps": 2, "plain_head": True}
    figures = {"peak_memory_gib": 1.25, "step_s_median": 2.0, "pair_tokens_per_s": 99.0}
    rows: list[dict[str, Any]] = [
        {"method": "orpo", "memory": "fast", **figures},
        {"method": "dpo", "memory": "fast", "error": "killed"},
    ]
    record = {
        "machine": {"device_name": "Apple M9"},
        "settings": settings,
        "methods": rows,
        "date": "2026-11-23T00:00:00",
    }
    folder = documents / "docs" / "results" / "memory"
    folder.mkdir(parents=True)
    (folder / "m9.json").write_text(json.dumps(record))
    lines = regenerated("<!-- results: memory -->\n\n<!-- end of results -->", documents).splitlines()
    assert lines[3] == "| Apple M9 | m | 4 | orpo | fast --plain-head | 1.25 | 2.00 | 99 | 2026-11-23 |"
    assert lines[4] == "| Apple M9 | m | 4 | dpo | fast --plain-head | killed | – | – | 2026-11-23 |"


def test_modes_are_compared_with_the_plain_one_of_the_same_method(documents: Path) -> None:
    def row(method: str, memory: str, seconds: list[float], peak: float, reference: float = 0.0) -> dict[str, Any]:
        return {
            "method": method,
            "memory": memory,
            "steps_s": seconds,
            "step_s_median": seconds[0],
            "reference_s": reference,
            "peak_memory_gib": peak,
        }

    folder = documents / "docs" / "results" / "memory"
    folder.mkdir(parents=True)
    plain = [row("dpo", "plain", [6.0, 4.0], 4.0, 1.0), row("orpo", "plain", [8.0, 8.0], 8.0)]
    (folder / "m.json").write_text(
        json.dumps({"settings": {}, "methods": [*plain, row("dpo", "fast", [2.0, 2.0], 2.0)]})
    )
    switched = {"settings": {"share_prompt": False}, "methods": [row("orpo", "fast", [4.0, 4.0], 2.0)]}
    (folder / "m-other.json").write_text(json.dumps(switched))
    (folder / "other.json").write_text(json.dumps(switched))
    lines = regenerated("<!-- results: memory m -->\n\n<!-- end of results -->", documents).splitlines()
    assert lines[3:-1] == [
        "| orpo | plain | 16.0 | 1.00 | 8.00 | 8.00 | 8.00 | 1.00 |",
        "| orpo | fast --no-share-prompt | 8.0 | 2.00 | 4.00 | 4.00 | 2.00 | 0.25 |",
        "| dpo | plain | 10.0 | 1.00 | 6.00 | 7.00 | 4.00 | 1.00 |",
        "| dpo | fast | 4.0 | 2.50 | 2.00 | 2.00 | 2.00 | 0.50 |",
    ]


def doctors_record(**changes: Any) -> dict[str, Any]:
    def step(mode: str, shape: str = "SmolLM2-135M, bfloat16") -> dict[str, Any]:
        return {"name": f"{shape}, {mode}", "step_s": 0.25 if mode == "fast" else 0.5, "peak_gib": 1.5}

    products = [{"name": "product, bfloat16", "tflop_per_s": 14.25}]
    record = {
        "machine": {"chip": "Apple M9 Max", "memory_gib": 64.0, "system": "macOS 27.0"},
        "versions": {"mlx": "0.33.0"},
        "device": {"device_name": "Apple M9 Max"},
        "level": "full",
        "verdict": "PASS",
        "date": "2027-01-02T03:04:05",
        "checks": {
            "speed": [step("fast"), step("plain"), step("thrift", "Llama-3.2-3B, 4 of 28 layers, bfloat16, 4 bits")],
            "rival": [{"name": "mlx-lm-lora 9.9, SmolLM2-135M, bfloat16", "step_s": 0.75, "peak_gib": 9.0}],
            "calibration": [*products, {"name": "memory", "gigabytes_per_s": 400.0}],
        },
    }
    return {**record, **changes}


@pytest.mark.parametrize("kind", ["macs", "gpus"])
def test_an_examined_machine_has_a_row(documents: Path, kind: str) -> None:
    marker = f"<!-- results: {kind} -->\n\n<!-- end of results -->"
    assert EXAMINED[kind] in regenerated(marker, documents)
    folder = documents / "docs" / "results" / kind
    folder.mkdir(parents=True)
    (folder / "m9.json").write_text(json.dumps(doctors_record()))
    # A quick examination times another model.
    (folder / "quick.json").write_text(json.dumps(doctors_record(device={}, verdict="FAIL", checks={})))
    lines = regenerated(marker, documents).splitlines()
    assert lines[3] == (
        "| Apple M9 Max | 64 | macOS 27.0 | 0.33.0 | full | PASS | 0.250 | – | – | 0.500 | 0.750 "
        "| 1.50 | 14.2 | – | 400 | – | 2027-01-02 |"
    )
    assert lines[4] == f"| Apple M9 Max | 64 | macOS 27.0 | 0.33.0 | full | FAIL {'| – ' * 10}| 2027-01-02 |"
    (folder / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other\.json: is not what orpo-mlx doctor --json writes"):
        regenerated(marker, documents)


def test_figures_stand_with_how_they_were_taken(documents: Path) -> None:
    folder = documents / "docs" / "results" / "figures"
    folder.mkdir(parents=True)
    taken = {"date": "2026-01-02", "machine": "a Mac", "command": "make it"}
    (folder / "odd.json").write_text(json.dumps({**taken, "columns": ["a|", "b"], "rows": [["x|y", 1.5]]}))
    text = regenerated("<!-- results: figures odd -->\n\n<!-- end of results -->", documents)
    assert "| x\\|y | 1.5 |" in text
    assert "Taken 2026-01-02 on a Mac, by `make it`." in text


def test_what_cannot_be_published(documents: Path, tmp_path: Path, comparison: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"schema": 1}')
    with pytest.raises(DataError, match=r"is not a results\.json"):
        add_results(other, documents, "tiny", replies=True)
    for name in ("memory", "figures", "macs", "A b"):
        with pytest.raises(ConfigError, match="--name"):
            add_results(comparison / "results.json", documents, name, replies=True)
    with pytest.raises(DataError, match="no table 'odd', expected one of facts"):
        regenerated("<!-- results: tiny odd -->\n<!-- end of results -->", documents)
    other.write_text("[")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        add_results(other, documents, "tiny", replies=True)


@pytest.mark.parametrize("words", [["--name", "x"], ["--check", "--add", "f", "--name", "x"]])
def test_what_does_not_go_together_is_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("docs_tables.py", words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_script_is_a_program() -> None:
    script = str(ROOT / "scripts" / "docs_tables.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--without-replies" in done.stdout

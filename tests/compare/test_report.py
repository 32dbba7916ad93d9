"""The reports of a finished comparison: every figure in them is one of `results.json`."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.compare import tables
from orpo_mlx.compare.charts import sensitivity_panels
from orpo_mlx.compare.report import html, markdown, write_comparison

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


@pytest.fixture
def results(comparison: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((comparison / "results.json").read_text())
    return found


def test_what_is_written(comparison: Path) -> None:
    names = {path.name for path in comparison.iterdir()}
    pictures = {"accuracy.png", "time_accuracy.png", "memory.png", "loss.png", "sensitivity.png"}
    assert names == {"results.json", "report.md", "report.html", "comparison.json", "cells", *pictures}
    text = (comparison / "report.md").read_text()
    assert set(re.findall(r"\]\(([a-z_]+\.png)\)", text)) == pictures
    for name in pictures:
        assert (comparison / name).read_bytes().startswith(b"\x89PNG")


def test_reports_come_from_the_results_alone(results: dict[str, Any], comparison: Path, tmp_path: Path) -> None:
    write_comparison(results, tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_text() == (comparison / name).read_text()


def test_tables_show_the_figures(results: dict[str, Any]) -> None:
    dpo = results["methods"][1]
    dpo["summary"]["peak_memory_gib"] = {"mean": 1.2345, "sd": 0.1, "low": 1.0, "high": 2.0}
    dpo["summary"]["kl_per_reply"] = {"mean": 12.5, "sd": None, "low": 12.5, "high": 12.5}
    dpo["accuracy_interval"] = {"mean": 0.5, "low": 0.25, "high": 0.75}
    dpo["to_target"]["steps"] = [3, 6]
    results["methods"][0]["to_target"]["steps"] = [3, None]
    quality, cost = tables.quality(results), tables.cost(results)
    assert quality.rows[2][quality.header.index("accuracy, mean log-prob")].text == "50.0% (25.0% to 75.0%)"
    assert quality.rows[2][quality.header.index("KL to base, nats/reply")].text == "12.50"
    assert cost.rows[1][cost.header.index("peak memory, GiB (MLX)")] == ("1.234 (1.000 to 2.000)", 1.2345)
    place = cost.header.index("steps to 90%")
    assert [row[place].text for row in cost.rows[:2]] == ["by 1 of 2 seeds", "4.5"]


def test_failed_settings_are_named(results: dict[str, Any]) -> None:
    arm = results["methods"][0]
    arm["grid"][0] |= {"accuracy": None, "nll": None, "margin": None, "failed": "the loss is nan"}
    arm["sensitivity"] = None
    assert tables.grid(results).rows[0][3].text == "failed: the loss is nan"
    assert tables.sensitivity(results).rows[0][-1].text == "training failed at some"
    assert len(sensitivity_panels(results)) == 2


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_run_is_said_and_nothing_is_empty(results: dict[str, Any]) -> None:
    results["sanity"] = []
    for arm in results["methods"]:
        arm["grid"], arm["replies"] = [], []
    results["base"]["replies"] = []
    text = markdown(results)
    assert "give --sanity and a method" in text
    assert "## Replies" not in text
    assert "## Sensitivity" not in text
    page = html(results)
    assert "<h2>Replies" not in page
    assert "<h2>Sensitivity" not in page
    assert "<tbody>\n</tbody>" not in page


@pytest.mark.usefixtures("undrawn")
def test_a_wrong_label_arm_that_does_not_hold_is_loud(results: dict[str, Any]) -> None:
    results["sanity"][0]["holds"] = False
    assert tables.sanity(results).rows[0][-1].text == "NO"
    assert markdown(results).startswith(f"A SANITY CHECK FAILED ({results['sanity'][0]['name']}, labels swapped)")
    assert "A SANITY CHECK FAILED" in html(results)


def test_every_key_is_documented(results: dict[str, Any]) -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    arm = copy.deepcopy(results["methods"][1])
    parts = [results, arm, arm["summary"], arm["grid"][0], arm["to_target"], arm["curves"][0][0], arm["replies"][0]]
    parts += [results["budget"], results["data"], results["base"], results["sanity"][0], arm["accuracy_interval"]]
    parts += [arm["summary"]["training_s"]]
    for part in parts:
        for key in part:
            assert f"`{key}`" in text, key

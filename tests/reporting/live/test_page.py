"""The skeleton of the live page: it asks its own server and nobody else, and a run's name stays text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from orpo_mlx.reporting.live.page import CHARTS, live_page
from orpo_mlx.reporting.metrics_log import SPLITS, WIN_RATE, read_run
from tests.helpers.quiet_training import run_quietly

PAGE = live_page("<img src=x onerror=alert(1)>")


def test_the_policy_allows_what_is_there_and_its_own_server() -> None:
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', PAGE)[1])  # type: ignore[index]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for tag in ("style", "script"):
        (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.S)
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"


def test_nothing_comes_from_elsewhere() -> None:
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", PAGE) == ["data:,"]
    assert set(re.findall(r"https?://[^\"' ]+", PAGE)) == {"http://www.w3.org/2000/svg"}
    # Attributes that would be styles or scripts are not allowed by the policy, and would only do nothing.
    assert not re.search(r"<[^>]* (?:style|on[a-z]+)=", PAGE.split("<script>")[0])
    script = PAGE.split("<script>")[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)


def test_a_name_is_text() -> None:
    assert "<img" not in PAGE
    assert "<h1>Training: &lt;img src=x onerror=alert(1)&gt;</h1>" in PAGE


def test_every_control_has_a_name() -> None:
    for found in re.findall(r"<(?:select|input) id=\"(\w+)\"", PAGE):
        assert re.search(rf"<label[^>]*>[^<]+<(?:select|input) id=\"{found}\"", PAGE), found


def test_what_is_drawn_is_what_a_run_reports(settings: dict[str, Any]) -> None:
    run_quietly(settings)
    run = read_run(Path(settings["adapter_path"]))
    data = json.loads(html.unescape(re.search(r'data-what="([^"]*)"', PAGE)[1]))  # type: ignore[index]
    assert data["splits"] == list(SPLITS) == ["train", "valid", "test"]
    assert [chart["title"] for chart in data["charts"]] == [chart.title for chart in CHARTS]
    for chart in data["charts"]:
        # Win rates are reported where a run has a judge.
        for key in set(chart["keys"]) - set(WIN_RATE.keys):
            assert run.points("train", key), key

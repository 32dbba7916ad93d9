"""The reports in a real browser. Left out, and said so, where none is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_mlx.reporting.run_report import write_report
from orpo_mlx.rounds.report import write_report as write_rounds
from tests.helpers.headless_browser import Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module", params=["comparison", "run"])
def report(request: pytest.FixtureRequest, comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "comparison":
        return comparison / "report.html"
    # A name no file system forbids and every page must escape.
    parent = tmp_path_factory.mktemp("run")
    folder = parent / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    cell = next((comparison / "cells").glob("orpo_seed0*/metrics.jsonl"))
    (folder / "metrics.jsonl").write_bytes(cell.read_bytes())
    return write_report([folder, cell.parent], parent)[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_clean_and_asks_for_nothing(browser: Browser, report: Path, scheme: str) -> None:
    browser.events.clear()
    browser.open(report, width=360, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == []
    images = browser.run("[...document.images].map((i) => [i.complete, i.naturalWidth, i.currentSrc.length])")
    assert len(images) >= 4
    assert all(complete and width > 100 for complete, width, _ in images)
    # Readable on a phone: nothing but tables, which scroll by themselves, is wider than the screen.
    assert browser.run("document.documentElement.scrollWidth") <= 360
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    dark = browser.run("document.images[0].currentSrc === document.querySelector('source').srcset")
    assert dark == (scheme == "dark")


def test_tables_sort_by_number_and_by_text(browser: Browser, comparison: Path) -> None:
    browser.open(comparison / "report.html")
    column = """(table, place) => [...document.querySelectorAll('table')[table].tBodies[0].rows].map(
        (row) => row.cells[place].dataset.value ?? row.cells[place].textContent)"""
    titles = browser.run("[...document.querySelectorAll('h2')].map((h) => h.textContent)")
    table = titles.index("What each method cost") - 1
    click = f"document.querySelectorAll('table')[{table}].tHead.rows[0].cells"
    before = [float(value) for value in browser.run(f"({column})({table}, 5)")]
    assert len(before) == 3
    browser.run(f"{click}[5].firstChild.click()")
    assert [float(value) for value in browser.run(f"({column})({table}, 5)")] == sorted(before)
    browser.run(f"{click}[5].firstChild.click()")
    assert [float(value) for value in browser.run(f"({column})({table}, 5)")] == sorted(before, reverse=True)
    assert browser.run(f"{click}[5].getAttribute('aria-sort')") == "descending"
    browser.run(f"{click}[0].firstChild.click()")
    assert browser.run(f"({column})({table}, 0)") == ["dpo", "dpo --reference copy", "orpo"]
    assert browser.run(f"{click}[5].hasAttribute('aria-sort')") is False


def test_what_the_data_says_is_text(browser: Browser, comparison: Path) -> None:
    browser.events.clear()
    browser.open(comparison / "report.html")
    shown = browser.run("document.body.innerText")
    results = json.loads((comparison / "results.json").read_text())
    prompts = [reply["prompt"] for reply in results["base"]["replies"]]
    assert any("<script>alert(" in prompt for prompt in prompts)
    assert any("\x1b[31m" in prompt for prompt in prompts)
    for prompt in prompts:
        assert prompt.replace("\x1b", "\\x1b") in shown
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.body.querySelectorAll('b').length") == 0
    assert not [event for event in browser.events if event.get("method") == "Page.javascriptDialogOpening"]
    # Nor would a script run that got in: the page's own policy stops it.
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.got = 1'}))"
    )
    assert browser.run("window.got === undefined") is True
    assert "Content Security Policy" in json.dumps(browser.complaints())


def test_unbroken_names_and_replies_push_nothing_off_the_screen(
    browser: Browser, comparison: Path, tmp_path: Path
) -> None:
    run = tmp_path / ("y" * 200)
    run.mkdir()
    cell = next((comparison / "cells").glob("orpo_seed0*/metrics.jsonl"))
    (run / "metrics.jsonl").write_bytes(cell.read_bytes())
    rows = [dict.fromkeys(("prompt", "baseline", "candidate"), "W" * 2000)]
    (tmp_path / "round-1-replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {"win_rate": 0.5, "interval": [0.25, 0.75]}
    found = {**shares, **{f"{name}_length_controlled": value for name, value in shares.items()}, "kl": None}
    found |= {"candidate": {"mean_tokens": 3.0}, "findings": []}
    pairs = {"rows": 1, "prompts": 2, "left_out": {"unfinished": 3}}
    record = {"round": 1, "pairs": pairs, "training": {"steps": 1}, "evaluation": found}
    write_rounds(tmp_path, {"settings": {"judge": "W" * 200}, "stopped": None, "rounds": [record]})
    scrolled = "[...document.querySelectorAll('.wide')].filter((each) => each.scrollWidth > each.clientWidth).length"
    for page in (write_report([run], run)[0], tmp_path / "report.html"):
        browser.open(page, width=1280)
        assert browser.run("document.documentElement.scrollWidth") <= 1280
        assert browser.run(scrolled) == 0, page
        browser.open(page, width=390)
        assert browser.run("document.documentElement.scrollWidth") <= 390

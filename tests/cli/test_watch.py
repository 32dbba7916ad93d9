"""`orpo-mlx watch`, and `--watch` of a run."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import orpo_mlx.train as training_module
from orpo_mlx.cli.train import main as train_main
from orpo_mlx.cli.watch import main
from orpo_mlx.config.checks import check_settings, make_config
from orpo_mlx.errors import ConfigError, TrainingError
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.live import server as live_server
from orpo_mlx.reporting.live.feed import Feed
from orpo_mlx.reporting.live.server import serving
from orpo_mlx.train import train
from orpo_mlx.training.prepare import load_run
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from tests.helpers.kill_and_resume import same
from tests.helpers.quiet_training import flags, run_quietly
from tests.reporting.live.test_feed import record, report


def look(address: str) -> dict[str, Any]:
    """What the page is told first, and the lines with it."""
    with urllib.request.urlopen(f"{address}news?page=ab&after=", timeout=30) as reply:
        head, _, lines = reply.read().partition(b"\n")
    return {**json.loads(head), "lines": [json.loads(line) for line in lines.splitlines()]}


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    command = [sys.executable, "-m", "orpo_mlx", "watch", str(folder)]
    # A suite that was started in the background has SIGINT ignored, and would pass that on.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{folder} holds no metrics.jsonl yet: the page waits for it.\n"
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert address is not None
        assert look(address[0])["lines"] == []
        record(folder, {"total_steps": 7})
        (folder / "metrics.jsonl").write_bytes(report(5, 1.0))
        found = look(address[0])
        assert (found["state"], found["total"], found["lines"][0]["step"]) == ("ended", 7, 5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{0}/nowhere"], "{0}/nowhere: no such folder; give the --adapter-path of a run of orpo-mlx train"),
        (["{0}/other"], "{0}/other: holds no run (no metrics.jsonl, no train.lock); give the --adapter-path of a run"),
        (["{0}", "--port", "65536"], "--port 65536: expected a whole number from 0 to 65535"),
        (["{0}", "--port", "x"], "--port x: expected a whole number from 0 to 65535"),
        (["{0}", "--port", "{1}"], "--port {1}: cannot be served on 127.0.0.1 (Address already in use); give another"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    (tmp_path / "metrics.jsonl").touch()
    with serving(Feed(tmp_path), 0, "--port") as other:
        port = other.server_address[1]
        assert main([word.format(tmp_path, port) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"orpo-mlx watch: error: {expected.format(tmp_path, port)}")


def watched(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, at_step: Any) -> str:
    """Train with a page; `at_step(address, step)` is called within each step. What was said."""
    out = io.StringIO()

    def step(run: Run, pairs: Any, count: int) -> Any:
        address = re.search(r"http://127\.0\.0\.1:\d+/", out.getvalue())
        assert address is not None
        at_step(address[0], count)
        return optimiser_step(run, pairs, count)

    monkeypatch.setattr("orpo_mlx.training.loop.optimiser_step", step)
    monkeypatch.setattr(live_server, "_LINGER_S", 0.1)
    train(make_config({**settings, "watch": 0}), Reporter(Console(file=out, width=200)))
    return out.getvalue()


def test_a_run_that_is_watched_tells_its_figures_and_is_the_same_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"samples": 1}
    folder = Path(settings["adapter_path"])
    whole = folder.with_name("whole")
    run_quietly({**settings, "adapter_path": str(whole)})
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(report(1, 1.0) * 100)
    seen: list[dict[str, Any]] = []
    watched(settings, monkeypatch, lambda address, step: seen.append(look(address)))
    assert [found["state"] for found in seen] == ["going on"] * 3
    assert [found["total"] for found in seen] == [3] * 3
    steps = [[line["step"] for line in found["lines"] if line["split"] == "train"] for found in seen]
    assert steps == [[], [1], [1, 2]]
    assert any(line.startswith("Training ") for line in seen[0]["said"])
    assert not any("tok/s" in line for line in seen[2]["said"])
    assert same(whole, folder)


def test_while_it_is_prepared_the_page_is_there(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def loading(config: Any, *rest: Any) -> Run:
        seen.append(look(f"http://127.0.0.1:{config.watch}/"))
        return load_run(config, *rest)

    with serving(Feed(Path(settings["data"])), 0, "--port") as other:
        port = other.server_address[1]
    monkeypatch.setattr(training_module, "load_run", loading)
    monkeypatch.setattr(live_server, "_LINGER_S", 0.1)
    run_quietly({**settings, "watch": port})
    assert (seen[0]["state"], seen[0]["lines"]) == ("preparing", [])


def test_a_port_that_is_taken_ends_it_before_anything_is_written(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Feed(Path(settings["data"])), 0, "--port") as other:
        port = other.server_address[1]
        assert train_main([*flags(settings), "--watch", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"orpo-mlx train: error: --watch {port}: cannot be served on 127.0.0.1")
    assert not Path(settings["adapter_path"]).exists()


def test_what_ended_it_is_the_last_that_the_page_is_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out: list[str] = []

    def fail(address: str, step: int) -> None:
        if step == 2:
            raise RuntimeError("no such luck")

    def closed(server: live_server.LiveServer) -> None:
        out.extend(server.feed.facts()["said"])
        close(server)

    close = live_server.LiveServer.close
    monkeypatch.setattr(live_server.LiveServer, "close", closed)
    with pytest.raises(TrainingError, match="no such luck"):
        watched(settings, monkeypatch, fail)
    assert "no such luck; step 1 is saved" in out[-1]


@pytest.mark.parametrize("value", [-1, 65536, 1.5, True, "x"])
def test_what_is_no_port(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected a whole number from 0 to 65535"):
        check_settings({"watch": value}, "run.yaml")

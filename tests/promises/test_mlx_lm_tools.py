"""mlx-lm's own command lines with adapters from `train`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_mlx.cli.score import main as score
from tests.conftest import write_rows
from tests.helpers.tuned_adapters import ANSWER, PROMPT, tuned_adapters

_SECONDS = 60


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_adapters(tmp_path_factory.mktemp("tuned"), model_folder)


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "mlx_lm", *argv]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(*argv: str) -> str:
    done = subprocess.run(command(*argv), env=environment(), capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def server(model_folder: Path, adapters: Path, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    argv = ["server", "--model", str(model_folder), "--adapter-path", str(adapters), "--port", str(port)]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(command(*argv), env=environment(), stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(10 * _SECONDS):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(_SECONDS)
        log.close()


def generated(model_folder: Path, *argv: str) -> str:
    words = ("--prompt", PROMPT, "--max-tokens", "12", "--temp", "0", "--verbose", "False")
    return run("generate", "--model", str(model_folder), *words, *argv).strip()


def test_generate_and_server_give_the_same_text(model_folder: Path, adapters: Path, server: str) -> None:
    text = generated(model_folder, "--adapter-path", str(adapters))
    assert text == ANSWER
    # The server of mlx-lm 0.31 passes its --adapter-path by; the later ones take it before the request's.
    question = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 12,
        "temperature": 0,
        "adapters": str(adapters),
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == text


def test_a_fused_model_has_the_log_probs_of_the_adapters(model_folder: Path, adapters: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    run("fuse", "--model", str(model_folder), "--adapter-path", str(adapters), "--save-path", str(fused))
    rows = [
        {"prompt": PROMPT, "chosen": ANSWER, "rejected": "no"},
        {"prompt": "Why?", "chosen": "So", "rejected": "I"},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    scored = {}
    for name, argv in {
        "base": ["--model", str(model_folder)],
        "adapters": ["--model", str(model_folder), "--adapter-path", str(adapters)],
        "fused": ["--model", str(fused)],
    }.items():
        output = tmp_path / f"{name}.jsonl"
        assert score([*argv, "--data", str(data), "--output", str(output)]) == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        scored[name] = [line[f"{side}_mean_logps"] for line in lines for side in ("chosen", "rejected")]
    assert scored["fused"] == pytest.approx(scored["adapters"], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(scored["base"], scored["adapters"], strict=True)) > 0.5

"""Two processes are one run: same losses, same adapters; and where they are not one, they end with a sentence."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from orpo_mlx.training.checkpoints.random_numbers import random_state_of
from orpo_mlx.training.checkpoints.resume import newest
from orpo_mlx.training.distributed import Ranks, find_ranks
from tests.conftest import make_pairs, write_id_rows
from tests.helpers.kill_and_resume import FEW_THREADS, TIMED, adapters, records
from tests.helpers.quiet_training import run_quietly
from tests.training.checkpoints.test_resume import fail_before

MANY = {"iters": 11, "batch_size": 5, "micro_batch_tokens": 64, "steps_per_report": 1, "save_every": 4}


def ports(count: int) -> list[int]:
    """Ports of this machine that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def start(settings: list[dict[str, Any]], tmp_path: Path, *options: str) -> list[subprocess.Popen[str]]:
    """A process per entry of `settings`, brought together as `mlx.launch` does it."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(len(settings))]))
    processes = []
    for rank, values in enumerate(settings):
        config = tmp_path / f"rank {rank}.yaml"
        config.write_text(yaml.safe_dump(values))
        environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), **FEW_THREADS}
        argv = [sys.executable, "-m", "orpo_mlx.train", "-c", str(config), *options]
        processes.append(
            subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    return processes


def ends(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    ended = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        ended.append((process.returncode, out, err))
    return ended


def assert_close(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = records(first), records(second)
    assert [(row["step"], row["split"]) for row in ours] == [(row["step"], row["split"]) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {*TIMED, "split"}:
            # A mean of small differences of large sums, which other batches round otherwise.
            rel = 1e-4 if key == "kl" else tolerance
            assert mine[key] == pytest.approx(other[key], rel=rel, abs=2e-6), (key, mine["step"], mine["split"])
    for name, value in adapters(first).items():
        np.testing.assert_allclose(value, adapters(second)[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.fixture
def night(settings: dict[str, Any], data: Path) -> dict[str, Any]:
    # 13 pairs in fives: the last step of an epoch has 3, so that ranks have unequal shares.
    write_id_rows(data / "train.jsonl", make_pairs(13))
    return {**settings, **MANY}


@pytest.mark.parametrize(
    "method", ["orpo", "dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot", "kto", "bco"))]
)
def test_two_ranks_are_one_run_and_one_goes_on_for_two(
    night: dict[str, Any], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    night |= {"method": method, "nll": "sequence" if method == "orpo" else "completion", "max_grad_norm": 5.0}
    alone, together = {**night, "adapter_path": str(tmp_path / "alone")}, Path(night["adapter_path"])
    run_quietly(alone)
    if method == "dpo":
        # Interrupted as two, resumed as one.
        processes = start([{**night, "iters": 7}] * 2, tmp_path)
        assert [status for status, _, _ in ends(processes)] == [0, 0]
        monkeypatch.setenv("ORPO_MLX_CACHE", "off")
        run_quietly({**night, "resume": True})
        steps = [row["step"] for row in records(together) if row["split"] == "train"]
        assert steps == list(range(1, 12))
        losses = {row["step"]: row["loss"] for row in records(together) if row["split"] == "train"}
        expected = {row["step"]: row["loss"] for row in records(tmp_path / "alone") if row["split"] == "train"}
        for step, loss in expected.items():
            assert losses[step] == pytest.approx(loss, rel=1e-5, abs=2e-6), step
        return
    for status, out, err in ends(start([night] * 2, tmp_path)):
        assert status == 0, (out, err)
    assert_close(together, tmp_path / "alone")


@pytest.mark.slow
def test_one_run_goes_on_as_two(night: dict[str, Any], tmp_path: Path) -> None:
    run_quietly({**night, "adapter_path": str(tmp_path / "alone")})
    with pytest.MonkeyPatch.context() as patch:
        fail_before(9, patch)
        with pytest.raises(Exception, match="step 8 is saved"):
            run_quietly(night)
    # Rank 1 has never seen the folder: what it needs of the checkpoint comes from rank 0, settings included.
    mine = {"resume": True, "adapter_path": night["adapter_path"]}
    theirs = {"resume": True, "adapter_path": str(tmp_path / "elsewhere")}
    for status, out, err in ends(start([mine, theirs], tmp_path)):
        assert status == 0, (out, err)
    assert not (tmp_path / "elsewhere").exists()
    assert_close(Path(night["adapter_path"]), tmp_path / "alone")


@pytest.mark.parametrize("changed", ["setting", pytest.param("data", marks=pytest.mark.slow)])
def test_ranks_that_disagree_end_with_a_sentence(night: dict[str, Any], tmp_path: Path, changed: str) -> None:
    other = {**night, "learning_rate": 0.5}
    if changed == "data":
        write_id_rows(tmp_path / "other" / "train.jsonl", make_pairs(13, seed=5))
        other = {**night, "data": str(tmp_path / "other")}
    for status, out, err in ends(start([night, other], tmp_path)):
        assert status == 2, out
        # A rank calls a setting as its own file does.
        name, values = ("learning_rate", "0.5, rank 0 has 0.001") if changed == "setting" else ("data", ", rows of")
        assert re.search(rf"rank 1 has {name} \(in .*rank \d\.yaml\),? ?{re.escape(values.lstrip(', '))}", err)
    assert not (Path(night["adapter_path"]) / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_dies_or_hangs_ends_the_others(night: dict[str, Any], tmp_path: Path, number: int) -> None:
    night |= {"iters": 100_000, "save_every": 5, "steps_per_eval": 100_000, "rank_timeout": 3.0}
    first, second = start([night] * 2, tmp_path)
    folder = Path(night["adapter_path"])
    deadline = time.monotonic() + 60
    while newest(folder)[0] is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(second.pid, number)
    ((status, _, err),) = ends([first], timeout=30)
    second.kill()
    second.communicate()
    assert status == 2
    too_long = "have not answered for 3 s (--rank-timeout)"
    # The ring of MLX 0.31 does not tell that a connection broke.
    assert too_long in err or (number == signal.SIGKILL and "rank is lost" in err)
    assert "--resume" in err
    assert newest(folder)[0] is not None


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_after_the_same_step(night: dict[str, Any], tmp_path: Path) -> None:
    night |= {"iters": 100_000, "save_every": 3, "steps_per_eval": 100_000}
    processes = start([night] * 2, tmp_path)
    folder = Path(night["adapter_path"])
    deadline = time.monotonic() + 60
    while newest(folder)[0] is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(processes[1].pid, signal.SIGTERM)
    for status, _, err in ends(processes):
        assert status == 143, err
    checkpoint, problems = newest(folder)
    assert checkpoint is not None
    assert problems == []


@pytest.mark.slow
def test_mlx_launch_starts_a_run(night: dict[str, Any], tmp_path: Path) -> None:
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.is_file():
        pytest.skip("mlx.launch is not beside this Python")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**night, "iters": 2}))
    argv = [str(launcher), "-n", "2", "--backend", "ring", "--starting-port", str(ports(1)[0]), "--python"]
    argv += [sys.executable, "-m", "orpo_mlx.train", "-c", str(config)]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, env={**os.environ, **FEW_THREADS}
    )
    # Rank 0 alone speaks.
    assert done.stdout.count("Adapters, metrics and settings are in") == 1, (done.stdout, done.stderr)


def test_one_process_of_mlx_launch_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("\n")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert find_ranks(1.0).size == 1


def test_a_process_alone_is_rank_0_of_1() -> None:
    ranks = find_ranks(1.0)
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert ranks.gather({"a": [1.5, None]}) == [{"a": [1.5, None]}]
    assert ranks.from_first(b"\0x") == b"\0x"
    assert ranks.share("abc") == ["a", "b", "c"]
    arrays = {"a": mx.array([1.0])}
    assert ranks.sum(arrays)["a"] is arrays["a"]


def test_shares_are_disjoint_and_whole() -> None:
    ranks = Ranks()
    ranks.size = 3
    shares = [ranks.share(range(8), rank) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(8))


def test_ranks_never_draw_the_same_random_numbers() -> None:
    drawn = {random_state_of(rank, [(0, 7)]) for rank in range(50)}
    assert len(drawn) == 50
    assert random_state_of(1, [(0, 7), (3, 4)]) == (3, 4)


def test_a_rank_that_nobody_joins_ends(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(2)]))
    code = "from orpo_mlx.training.distributed import find_ranks; find_ranks(1.0)"
    environment = {**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == "the other ranks have not come within 1 s.\n"

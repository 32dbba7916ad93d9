"""The first signal ends a run between steps and saves it; the second leaves at once."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.interrupts import Interrupted
from orpo_mlx.training.checkpoints.resume import newest
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.step import optimiser_step
from tests.helpers.kill_and_resume import same
from tests.helpers.quiet_training import flags, run_quietly
from tests.training.checkpoints.test_resume import LONG


@pytest.mark.parametrize(
    ("number", "status", "where"),
    [
        (signal.SIGINT, 130, "step"),
        (signal.SIGTERM, 143, "evaluation"),
        pytest.param(signal.SIGTERM, 143, "step", marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    status: int,
    where: str,
) -> None:
    folder = Path(settings["adapter_path"]).with_name("a night's run")
    settings |= {**LONG, "adapter_path": str(folder)}
    whole = folder.with_name("whole")
    if where == "step":
        run_quietly({**settings, "adapter_path": str(whole)})

    def step(run: Run, pairs: Any, count: int) -> Any:
        if count == 3 and where == "step":
            os.kill(os.getpid(), number)
        return optimiser_step(run, pairs, count)

    def evaluating(*arguments: Any, **options: Any) -> Any:
        if not options["untrained"]:
            os.kill(os.getpid(), number)
        return evaluate(*arguments, **options)

    from orpo_mlx.training.evaluating.evaluation import evaluate

    with monkeypatch.context() as patch:
        patch.setattr("orpo_mlx.training.loop.optimiser_step", step)
        if where == "evaluation":
            patch.setattr("orpo_mlx.training.evaluating.evaluation.evaluate", evaluating)
        before = signal.getsignal(number)
        assert main(flags(settings)) == status
        assert signal.getsignal(number) == before
    done = 3 if where == "step" else 4
    err = capfd.readouterr().err
    assert "Stopping after this step; a second signal leaves at once." in err
    said = re.search(rf"interrupted: step {done} is saved, go on with orpo-mlx train (.*)\.\n", err)
    assert said is not None
    assert shlex.split(said[1]) == ["--resume", "--adapter-path", str(folder)]
    checkpoint, _ = newest(folder)
    assert checkpoint is not None
    assert checkpoint.step == done
    if where == "step":
        assert main(["--resume", "--adapter-path", str(folder)]) == 0
        assert same(whole, folder)


def test_a_signal_before_the_first_step_says_that_nothing_was_saved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from orpo_mlx.training.evaluating.evaluation import evaluate

    def evaluating(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr("orpo_mlx.training.evaluating.evaluation.evaluate", evaluating)
    assert main(flags(settings)) == 143
    assert "interrupted: nothing was saved." in capfd.readouterr().err


@pytest.mark.parametrize("test", [False, True])
def test_a_signal_after_the_last_step_is_not_lost(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], test: bool
) -> None:
    from orpo_mlx.training.evaluating.evaluation import evaluate

    def evaluating(*arguments: Any, **options: Any) -> Any:
        found = evaluate(*arguments, **options)
        if not options["untrained"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    # One split, so that nobody looks for a signal after it.
    settings |= {"val_batches": 0, "iters": 1}
    if test:
        run_quietly(settings)
    monkeypatch.setattr("orpo_mlx.training.evaluating.evaluation.evaluate", evaluating)
    argv = ["--test", "--adapter-path", settings["adapter_path"]] if test else flags(settings)
    assert main(argv) == 143
    said = "the figures are in" if test else "the run was done, and is saved in"
    printed = capfd.readouterr()
    assert f"interrupted: {said} {settings['adapter_path']}" in printed.err
    assert "Adapters" not in printed.out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(number: int, status: int) -> None:
    code = (
        "import os, sys, time; from orpo_mlx.training.interrupts import StopSignals\n"
        f"with StopSignals() as stop:\n    os.kill(os.getpid(), {int(number)}); print(stop.number, flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)}); time.sleep(30); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stdout == f"{int(number)}\n"
    assert "Leaving at once" in done.stderr


def test_other_threads_are_left_alone() -> None:
    found = []

    def work() -> None:
        with StopSignals() as stop:
            stop.check()
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_what_is_raised_names_the_signal() -> None:
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.number == signal.SIGTERM

"""A signal at any moment of a command: one sentence and 128 + its number, and never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_mlx._command import is_a_command
from orpo_mlx.config.flags import exit_status
from orpo_mlx.errors import TrainingError
from orpo_mlx.interrupts import SIGNALS, Interrupted, raising_interrupts
from orpo_mlx.train import saying_on_interrupt

_READY = "import orpo_mlx.interrupts as i; print('ready', flush=True); import time; time.sleep(20)"


def killed(argv: list[str], number: int, after: float = 0.0, *, ready: bool = False) -> tuple[int, str]:
    """Status and stderr of a command that a signal meets."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if ready:
        assert process.stdout is not None
        process.stdout.readline()
    time.sleep(after)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_during_the_imports_of_a_command(number: int, status: int, tmp_path: Path) -> None:
    code = f"import sys; sys.argv = ['orpo-mlx']; {_READY}"
    assert killed([sys.executable, "-c", code], number, ready=True) == (
        status,
        "orpo-mlx: interrupted: nothing was saved.\n",
    )


@pytest.mark.parametrize("module", ["interrupts", "_blas", "_open_files"])
def test_while_the_package_is_imported(module: str) -> None:
    code = f"""
import os, signal, sys
class Sender:
    def find_spec(self, name, *others):
        if name == "orpo_mlx.{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Sender())
sys.argv = ["orpo-mlx"]
import orpo_mlx
"""
    # Before there is anybody to say so, it is ended without a word.
    early = (-signal.SIGINT, "")
    expected = early if module == "interrupts" else (130, "orpo-mlx: interrupted: nothing was saved.\n")
    assert killed([sys.executable, "-c", code], 0) == expected


def test_other_programs_keep_their_handlers() -> None:
    status, err = killed([sys.executable, "-c", _READY], signal.SIGINT, ready=True)
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in err


def test_a_hangup_that_nohup_has_switched_off_stays_off() -> None:
    code = f"import signal, sys; signal.signal(1, signal.SIG_IGN); sys.argv = ['orpo-mlx']; {_READY[:-2]}0.1)"
    assert killed([sys.executable, "-c", code], signal.SIGHUP, ready=True) == (0, "")


@pytest.mark.parametrize(
    ("argv", "originally", "expected"),
    [
        (["/x/bin/orpo-mlx", "train"], [], True),
        (["-m"], ["python", "-m", "orpo_mlx.train"], True),
        (["-m", "--help"], ["python", "-X", "dev", "-m", "orpo_mlx", "--help"], True),
        (["-m"], ["python", "-m", "pytest", "-m", "orpo_mlx"], False),
        (["-c"], ["python", "-c", "import orpo_mlx"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_what_is_a_command(
    argv: list[str], originally: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", originally)
    assert is_a_command() is expected


@pytest.mark.parametrize("number", SIGNALS)
def test_in_a_command(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    def translating() -> None:
        try:
            command()
        except KeyboardInterrupt:
            raise ImportError("an extension could not be loaded") from None

    for ending in (command, translating):
        assert exit_status("prog", ending) == 128 + number
        assert capsys.readouterr().err == "prog: interrupted: nothing was saved.\n"


@pytest.mark.parametrize("first", [Interrupted(2, "step 4 is saved"), TrainingError("full; step 4 is saved")])
def test_a_second_signal_does_not_take_back_what_the_first_was_to_say(
    first: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        with saying_on_interrupt("step 2 is saved"):
            try:
                raise first
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)

    assert exit_status("prog", command) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == f"prog: interrupted: {first}.\n"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with raising_interrupts("prog"):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_interrupt_where_python_would_swallow_it() -> None:
    code = (
        "import os, weakref; from orpo_mlx.config.flags import exit_status\n"
        "class Thing: pass\n"
        "def command():\n"
        "    thing = Thing(); kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), 2)); del thing\n"
        "    print('went on')\n"
        "raise SystemExit(exit_status('prog', command))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "prog: interrupted: nothing was saved.\n")


def test_a_late_signal_keeps_the_status() -> None:
    code = (
        "import sys; sys.argv = ['orpo-mlx']; from orpo_mlx.config.flags import exit_status\n"
        "status = exit_status('prog', lambda: None); print('ready', flush=True); import time; time.sleep(20)"
    )
    assert killed([sys.executable, "-c", code], signal.SIGTERM, ready=True) == (0, "")


def test_a_signal_that_is_raised_says_its_number() -> None:
    assert Interrupted(15, "x").number == 15
    assert isinstance(Interrupted(15), KeyboardInterrupt)

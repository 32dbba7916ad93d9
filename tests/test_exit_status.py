"""How a command ends."""

from __future__ import annotations

import pytest

from orpo_mlx.config.command_line import OneLineParser
from orpo_mlx.errors import DataError, exit_status


def raising(error: BaseException) -> int:
    def command() -> None:
        raise error

    return exit_status("prog", command)


def test_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("prog", lambda: None) == 0
    assert raising(DataError("file:3: is odd.")) == 2
    assert raising(DataError("file:3: is odd")) == 2
    assert raising(KeyboardInterrupt()) == 130
    assert raising(KeyboardInterrupt("saved in x")) == 130
    assert capsys.readouterr().err.splitlines() == [
        "prog: error: file:3: is odd.",
        "prog: error: file:3: is odd.",
        "prog: interrupted: nothing was saved.",
        "prog: interrupted: saved in x.",
    ]


def test_a_file_that_cannot_be_written_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(OSError(28, "No space left on device", "a/b.json")) == 2
    assert raising(OSError("odd")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "prog: error: a/b.json: No space left on device; free space or choose another folder.",
        "prog: error: odd; free space or choose another folder.",
    ]


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())


def test_a_flag_that_is_unknown_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        OneLineParser(prog="prog").parse_args(["--odd"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "prog: error: unrecognized arguments: --odd; see prog --help.\n"


def test_control_characters_in_a_message_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise DataError("f:1: found \x1b[2Jkey\n")

    assert exit_status("prog", command) == 2
    assert capsys.readouterr().err == "prog: error: f:1: found \\x1b[2Jkey\\n.\n"


def test_a_question_needs_no_full_stop(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise DataError("did you mean this?")

    assert exit_status("prog", command) == 2
    assert capsys.readouterr().err == "prog: error: did you mean this?\n"

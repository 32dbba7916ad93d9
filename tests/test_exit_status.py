"""How a command ends."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.errors import DataError, did_you_mean, kind_and_reason, reason_of


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
    assert raising(OSError(errno.EDQUOT, "Disk quota exceeded", "a/b.json")) == 2
    assert raising(PermissionError(13, "Permission denied", "a/b.json")) == 2
    assert raising(OSError(5, "Input/output error", "a/b.json")) == 2
    assert raising(OSError("odd")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "prog: error: a/b.json: No space left on device; free space or choose another folder.",
        "prog: error: a/b.json: Disk quota exceeded; free space or choose another folder.",
        "prog: error: a/b.json: Permission denied; give this user access to it, or name another.",
        "prog: error: a/b.json: Input/output error.",
        "prog: error: odd.",
    ]


def test_a_current_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_status("prog", Path.cwd) == 2
    assert capsys.readouterr().err == "prog: error: the current folder was removed; change into one that is there.\n"


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


def test_what_a_message_quotes_does_not_make_it_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(DataError(f"file:3: {'x' * 100_000}; leave it out.")) == 2
    err = capsys.readouterr().err
    assert len(err) <= 400
    assert err.startswith("prog: error: file:3: xxx")
    assert err.endswith("xxx; leave it out.\n")


def test_a_question_needs_no_full_stop(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise DataError("did you mean this?")

    assert exit_status("prog", command) == 2
    assert capsys.readouterr().err == "prog: error: did you mean this?\n"


def test_a_reason_is_one_line_without_a_full_stop() -> None:
    assert reason_of(ValueError("one\n  two.\n")) == "one two"
    assert reason_of(ValueError("one\n  two.\n"), first_line=True) == "one"
    assert reason_of(ValueError(" . ")) == "ValueError"
    assert len(reason_of(ValueError("x" * 999))) == 300
    assert len(reason_of(ValueError("x" * 999), None)) == 999
    assert kind_and_reason(KeyError("x")) == "KeyError: 'x'"
    assert kind_and_reason(KeyError()) == "KeyError"


def test_the_nearest_known_word_is_named() -> None:
    assert did_you_mean("trian", ["train", "test"]) == "; did you mean train?"
    assert did_you_mean("x", ["train"]) == "."
    assert did_you_mean(3, ["train"], "; expected train.") == "; expected train."


def test_names_that_the_locale_lacks_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = OneLineParser("prog")
    parser.add_argument("--data")
    remedies = {"ascii": "set LC_ALL=C.UTF-8, or PYTHONUTF8=1", "utf-8": "rename it"}
    for encoding, remedy in remedies.items():
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda encoding=encoding: encoding)
        # As Python reads an umlaut's two bytes where the locale has none, and a byte that is no UTF-8 anywhere.
        with pytest.raises(SystemExit):
            parser.parse_args(["--data", "\udcc3\udcbc/d"])
        assert remedy in capsys.readouterr().err
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert raising(UnicodeEncodeError("ascii", "o/\xfc", 2, 3, "ordinal not in range(128)")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert remedies["ascii"] in line
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    with pytest.raises(UnicodeEncodeError):
        raising(UnicodeEncodeError("ascii", "a defect", 2, 3, "ordinal not in range(128)"))

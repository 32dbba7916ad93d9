"""How a command speaks and ends: one sentence on stderr, in which settings are called by their flags."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from orpo_mlx._streams import lasting_streams, written_out
from orpo_mlx.config.settings import SETTINGS
from orpo_mlx.errors import ConfigError, TrainingError, UserError, naming_device_errors
from orpo_mlx.interrupts import Interrupted, finished, message_of, raising_interrupts
from orpo_mlx.text import clipped, printable, quoted, spell_unprintable

_MENTION = re.compile(r"`(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>[^`]*))?`")
"""How libraries mention a setting: `seed`, or with a value `memory=fast`, `shuffle=False`."""


_MOST = 399
"""Characters of a sentence on stderr: what it quotes of a flag or a file may have millions."""
_MOST_OF_A_RUN = 1200
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free space or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "; give this user access to it, or name another"),
}
"""What to do about an error of the system; of the others nothing is known that holds for all."""


class GivenOnce(argparse.Action):
    """A flag of which argparse would take the last value without a word, where it is given twice."""

    def __call__(self, parser: argparse.ArgumentParser, found: argparse.Namespace, value: Any, _: Any = None) -> None:
        """argparse's."""
        if getattr(found, self.dest, None) is not None:
            parser.error(f"{self.option_strings[-1]}: is given twice, expected one file; put the settings into one")
        setattr(found, self.dest, value)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one sentence on stderr and exit status 2, and name the flag that was meant."""

    def __init__(self, *args: Any, known_as: Mapping[str, str] | None = None, **options: Any) -> None:
        """argparse's arguments, and flags of other programs by which an unknown one is guessed."""
        super().__init__(*args, **options)
        self._known_as = dict(known_as or {})

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage text and leave with status 2."""
        end = f" See {self.prog} --help." if message.endswith("?") else f"; see {self.prog} --help."
        # Clipped before the end is added, so that the way to --help is never what is cut away.
        self.exit(2, clipped(f"{self.prog}: error: {printable(message).rstrip('.')}", _MOST - len(end)) + f"{end}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's, which takes for printed what a stream refuses: a --help that is not there would be well."""
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's; `--batch_size` is `--batch-size`, and empty values are refused: `--adapter-path=` would be the
        folder one happens to be in."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            if not _is_utf8(word):
                self.error(f"{printable(word)}: is no text in UTF-8, {_locale_advice()}")
        found, rest = super().parse_known_args(self._dashed(words), namespace)
        for action in self._actions:
            if getattr(found, action.dest, None) == "" and action.default != "":
                long = [flag for flag in action.option_strings if flag.startswith("--")]
                name = next(iter([*long, *action.option_strings]), action.metavar or action.dest)
                self.error(f"{name}: is empty; give a value, or leave it out")
        return found, rest

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, with a guess at what an unknown flag was to be."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._guess(rest)}")
        return found

    def _guess(self, words: Sequence[str]) -> str:
        for word in words:
            if word.startswith("--"):
                flag = word.partition("=")[0].lower().replace("_", "-")
                known = [*self._option_string_actions, *self._known_as]
                # Closer than words of other messages must be: all flags have something in common.
                near = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
                if near:
                    return f"; did you mean {self._known_as.get(near[0], near[0])}?"
        return ""

    def _dashed(self, words: Sequence[str]) -> list[str]:
        """The words with flags as they are written here, where another spelling is one of them."""
        dashed = []
        for word in words:
            flag, equals, value = word.partition("=")
            own = flag.replace("_", "-")
            dashed.append(own + equals + value if own in self._option_string_actions else word)
        return dashed


def _is_utf8(word: str) -> bool:
    """Whether a word can be given to libraries: bytes that Python could not read stand there as half surrogates."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _locale_advice() -> str:
    if sys.getfilesystemencoding() == "utf-8":
        return "which the names of a model's files must be; rename it"
    return f"since this locale is {sys.getfilesystemencoding()}; set LC_ALL=C.UTF-8, or PYTHONUTF8=1"


def flag_of(name: str, value: str | None = None) -> str:
    """What a command line has for a setting, or an argument of a library, and its value."""
    dashed = name.replace("_", "-")
    switches = {None: f"--{dashed}", "True": f"--{dashed}", "False": f"--no-{dashed}"}
    return switches.get(value, f"--{dashed} {value}")


def key_of(name: str, value: str | None = None) -> str:
    """What a config file has for a setting and its value."""
    return name if value is None else f"{name}: {value.lower() if value in ('True', 'False') else value}"


def with_flags(text: str, own: Collection[str] = ()) -> str:
    """A library's message with the settings it mentions as flags; `own` are a command's besides those of `train`."""
    # Data may stand in backticks as well, and is left alone.
    return _respelled(text, lambda name, value: flag_of(name, value) if name in SETTINGS or name in own else None)


def with_keys(text: str, file: str, keys: Mapping[str, str]) -> str:
    """A library's message with the settings that a config file gave as that file's keys.

    Args:
        text: the message.
        file: the config file, as messages name it.
        keys: how the file spells each setting that it gave.
    """
    table = next((name for name in keys if _is_table(name) and text.startswith((f"{name}.", f"{name}:"))), None)
    if table is not None:
        text = text.removeprefix(table)
        return f"{file}: {keys[table]}{_as_keys(text, keys)}"
    mention = next((each for each in _MENTION.finditer(text) if each["name"] in keys), None)
    if mention is None:
        return text
    if mention.start() == 0:
        return f"{file}: {_as_keys(text, keys)}"
    # Only in passing: a flag contradicts it, or a row's error gives advice.
    own = key_of(keys[mention["name"]], mention["value"])
    return f"{text[: mention.start()]}{own} (in {file}){_as_keys(text[mention.end() :], keys)}"


def _is_table(name: str) -> bool:
    return name in SETTINGS and SETTINGS[name].kind is dict


def _as_keys(text: str, keys: Mapping[str, str]) -> str:
    return _respelled(text, lambda name, value: key_of(keys[name], value) if name in keys else None)


def _respelled(text: str, spell: Callable[[str, str | None], str | None]) -> str:
    """A message with each mention of a setting, by its name and value, as `spell` has it; None leaves it alone."""

    def spelled(mention: re.Match[str]) -> str:
        found = spell(mention["name"], mention["value"])
        return mention[0] if found is None else found

    return _MENTION.sub(spelled, text)


@contextmanager
def naming_flags(own: Collection[str] = ()) -> Iterator[None]:
    """Let errors that pass through call settings by their flags."""
    try:
        yield
    except UserError as error:
        # Changed in place: a new exception would lose the kind, the cause and the traceback.
        error.args = (with_flags(str(error), own),)
        raise


@contextmanager
def naming_keys(file: str, keys: Mapping[str, str]) -> Iterator[None]:
    """Let errors that pass through call the settings of a config file as `with_keys` does."""
    try:
        yield
    except UserError as error:
        error.args = (with_keys(str(error), file, keys),)
        raise


def exit_status(prog: str, command: Callable[[], object]) -> int:
    """Run a command: 0, 2 with one sentence on stderr for what a user can mend, or 128 + a signal's number."""
    lasting_streams()
    spell_unprintable()
    with raising_interrupts(prog) as signals:
        try:
            with naming_flags(), naming_device_errors(), written_out():
                command()
            status = 0
        except KeyboardInterrupt as interrupt:
            status = _tell_interrupt(prog, interrupt, signals.number)
        except Exception as error:
            # Libraries turn an interrupt in the middle of an import into errors of their own.
            if signals.number is not None:
                status = _tell_interrupt(prog, Interrupted(signals.number, message_of(error)), signals.number)
            elif isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
                # A name from a file, which is in UTF-8 whatever the locale.
                _print(f"{prog}: error: {quoted(error.object)}: is no name of a file {_locale_advice()}.")
                status = 2
            elif isinstance(error, (UserError, OSError)):
                _tell_error(prog, error)
                status = 2
            else:
                raise
        finished(status)
    return status


def why_it_died(status: int, errors: Sequence[str], prog: str) -> str | None:
    """Why a command's process ended, from the lines it wrote on stderr; None where it ended well.

    Raises:
        ConfigError: by `exit_status`, it is something a user can mend, whose sentence is passed on.
    """
    if status == 0:
        return None
    last = ([line.strip() for line in errors if line.strip()] or ["no message"])[-1]
    if status == 2:
        raise ConfigError(last.removeprefix(f"{prog}: error: "))
    return printable(last).rstrip(".") if status > 0 else f"killed by {signal.Signals(-status).name}"


def _tell_error(prog: str, error: UserError | OSError) -> None:
    if isinstance(error, UserError):
        message = printable(str(error)).rstrip(".")
        message += "" if message.endswith("?") else "."
    elif error.errno == errno.ENOENT and not error.filename and _current_folder_is_gone():
        message = "the current folder was removed; change into one that is there."
    else:  # A full disk, or a folder that cannot be written, wherever a command meets it.
        location = f"{error.filename}: " if error.filename else ""
        advice = _ADVICE.get(error.errno or 0, "")
        message = printable(f"{location}{error.strerror or str(error).rstrip('.')}{advice}.")
    # A run that fails says what is saved, where, and how it goes on: several paths, and nothing that a stranger wrote.
    most = _MOST_OF_A_RUN if isinstance(error, TrainingError) else _MOST
    _print(clipped(f"{prog}: error: {message}", most))


def _current_folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _tell_interrupt(prog: str, interrupt: KeyboardInterrupt, number: int | None) -> int:
    """Say what an interrupt says; the exit status."""
    _print(f"{prog}: interrupted: {printable(with_flags(message_of(interrupt))) or 'nothing was saved'}.")
    return 128 + getattr(interrupt, "number", number or signal.SIGINT)


def _print(sentence: str) -> None:
    with suppress(OSError):  # A terminal that is closed by now must not change the status.
        print(sentence, file=sys.stderr)

"""Chat templates that cannot hold a run up: rendering is bounded in time, in size, and in what one operation may make.

A template is a program that comes with a model. transformers runs it in Jinja's sandbox, which keeps it from files and
attributes, but lets it loop for ever, or ask for a string of gigabytes.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import FrameType
from typing import Any

from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SECONDS = 10.0
"""Of the processor's time, for one conversation; templates take a millisecond."""
MOST_WALL_SECONDS = 120.0
"""For one conversation, whatever else the machine does."""
_LOOK_EVERY_S = 0.25
MOST_OWN_CHARACTERS = 1_000_000
"""That a template may add to a conversation; the longest system prompts of published templates have some 20,000."""
_MOST_MADE = 10_000_000
"""Characters or items that one operation may make, and the largest number that a function may be given."""
# Of a power: two small numbers make one that fills the memory.
_MOST_BITS = 100_000


class TemplateLimitError(Exception):
    """A template that takes too long or makes too much; says which."""


class _OutOfTimeError(BaseException):
    """What ends a block that takes too long. Not an Exception: a template's own code may take those for its own."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which single operations are bounded as well: a timer cannot end what Python does in C."""

    # What makes far more than it is given; + makes no more than the sum of both.
    intercepted_binops = frozenset({"*", "%", "**"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.filters = {name: _bounded_filter(function) for name, function in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As Jinja's."""
        if operator == "*":
            _check_made(_size(left) * right if isinstance(right, int) else _size(right) * left)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_made(max(left.bit_length(), 1) * right, _MOST_BITS)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:
        """As Jinja's."""
        # A macro is the template's own, and what it does with a number is bounded where it does it.
        if not isinstance(function, Macro):
            _check_numbers(function, (*args, *options.values()))
        _check_texts(function, (getattr(function, "__self__", None), *args))
        return super().call(context, function, *args, **options)


def bound_templates() -> None:
    """Let transformers compile chat templates in a `BoundedEnvironment` from now on."""
    # Here, by when mlx-lm is loaded: it tells transformers not to say on stderr that there is no PyTorch.
    from transformers.utils import chat_template_utils

    # The class is looked up in the module each time a template is compiled; there is no parameter for it.
    vars(chat_template_utils)["ImmutableSandboxedEnvironment"] = BoundedEnvironment


def render(tokenizer: Any, turns: Any, **options: Any) -> Any:
    """The tokenizer's `apply_chat_template`, bounded; raises TemplateLimitError, and whatever the template does."""
    bound_templates()
    with bounded_time():
        found = tokenizer.apply_chat_template(turns, **options)
    return check_length(found, turns, options) if isinstance(found, str) else found


@contextmanager
def bounded_time(seconds: float = MOST_SECONDS, wall: float = MOST_WALL_SECONDS) -> Iterator[None]:
    """Raise TemplateLimitError in the block once it has taken so much of the processor's time, or so long at all.

    The processor's time is this thread's (off the main thread on macOS, which tells no thread of another's, the
    process's): on a busy machine a harmless template waits for seconds.
    """
    main = threading.current_thread() is threading.main_thread()
    watch = _watched_by_signals if main else _watched_by_a_thread
    clock = time.thread_time if main else _clock_of_this_thread()
    begun, begun_at = clock(), time.monotonic()

    def spent() -> str | None:
        if clock() - begun >= seconds:
            return f"it took more than {seconds:g} seconds of the processor's time"
        return f"it did not end in {wall:g} seconds" if time.monotonic() - begun_at >= wall else None

    try:
        with watch(spent, min(seconds, wall, _LOOK_EVERY_S)):
            yield
    except _OutOfTimeError:
        raise TemplateLimitError(spent() or "it took too long") from None


@contextmanager
def _watched_by_signals(spent: Callable[[], str | None], every: float) -> Iterator[None]:
    def look(number: int, frame: FrameType | None) -> None:
        if spent():
            raise _OutOfTimeError

    earlier = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield
    finally:
        # The timer first: an alarm after the earlier handler is back would be that handler's, or end the process.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


@contextmanager
def _watched_by_a_thread(spent: Callable[[], str | None], every: float) -> Iterator[None]:
    """Signals reach the main thread alone; an exception can be sent to any, which takes it at its next operation."""
    target = ctypes.c_ulong(threading.get_ident())
    ended, lock = threading.Event(), threading.Lock()

    def look() -> None:
        while not ended.wait(every):
            with lock:
                # Under the lock, so that none is sent once the block is left.
                if not ended.is_set() and spent():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(_OutOfTimeError))
                    return

    watcher = threading.Thread(target=look, name="template timer", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            ended.set()
            # One that was sent and not yet taken is taken back.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(target, None)
        watcher.join()


def _clock_of_this_thread() -> Callable[[], float]:
    """The processor's time of the thread that calls this, to be asked by any."""
    # Not on macOS.
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    return time.process_time if clock_of is None else partial(time.clock_gettime, clock_of(threading.get_ident()))


def check_length(text: str, *given: Any) -> str:
    """`text` itself; TemplateLimitError where it is far longer than what was `given` accounts for."""
    # Asked only of long texts: to look through all that was given costs more than most renderings.
    if len(text) > MOST_OWN_CHARACTERS:
        # A template may write what it is given more than once, so it is allowed for four times over.
        own = len(text) - 4 * len(repr(given))
        if own > MOST_OWN_CHARACTERS:
            raise TemplateLimitError(f"it made {len(text):,} characters of {len(repr(given)):,}")
    return text


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses what a function may not be given either."""
    # Some take one of Jinja's own objects first.
    own = int(hasattr(function, "jinja_pass_arg"))

    # With its mark for Jinja, where it has one.
    @wraps(function)
    def bounded(*args: Any, **options: Any) -> Any:
        # What is filtered is asked for nothing: a tool may well be given a time in seconds.
        _check_numbers(function, (*args[own + 1 :], *options.values()))
        _check_texts(function, (*args[own:], *options.values()))
        return function(*args, **options)

    return bounded


def _check_numbers(function: Any, values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MOST_MADE:
            raise TemplateLimitError(f"it asked {_name(function)} for {_shown(value)}")


def _check_texts(function: Any, values: tuple[Any, ...]) -> None:
    """Refuse what makes far more than the texts it is given."""
    if _name(function) == "replace" and len(values) > 2:
        text, old, new = map(str, values[:3])
        _check_made(text.count(old) * (len(new) - len(old)))
    if _name(function) == "join":
        # As long as two of its texts multiplied.
        sizes = sorted(map(_size, values))
        _check_made(max(sizes, default=0) * max(sizes[:-1], default=0))


def _check_format(text: str, values: Any) -> None:
    """Refuse a width or precision that no text needs, in the format or beside it."""
    digits = "".join(character if character.isdigit() else " " for character in text).split()
    beside = values if isinstance(values, tuple) else (values,)
    # A word of 30 digits is too wide whatever it says, and int() raises for very long ones.
    widths = [int(word) for word in digits if len(word) < 30] + [_MOST_MADE + 1 for word in digits if len(word) >= 30]
    if "*" in text:
        widths += [abs(value) for value in beside if isinstance(value, int)]
    _check_made(max(widths, default=0))


def _check_made(size: Any, most: int = _MOST_MADE) -> None:
    if isinstance(size, (int, float)) and size > most:
        raise TemplateLimitError("one operation of it would make more than 10 million characters")


def _size(value: Any) -> Any:
    """Characters or items of what can be repeated, 0 of anything else."""
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__)).removeprefix("do_")


def _shown(value: int) -> str:
    # An integer of more digits than Python writes down would raise instead.
    return f"{value:,}" if abs(value) < 10**30 else "a number of more than 30 digits"

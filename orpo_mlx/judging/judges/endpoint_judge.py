"""A judge behind an OpenAI-style endpoint, such as mlx_lm.server, LM Studio or Ollama on this machine."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.judging.judges.verdicts import FAILURES, Question, Verdict, judge_parts, read_verdict

LOOPBACK = "http://127.0.0.1:8080/v1"
"""Where mlx_lm.server answers."""
ENDPOINT = "endpoint"
"""The name of a judge that is asked there."""
KEY_VARIABLE = "ORPO_MLX_JUDGE_KEY"
"""Holds the key that an endpoint wants, if it wants one."""
MOST_BYTES = 10_000_000
"""Of an answer; the rest is not read."""

_BLOCK = 1 << 16
# As many requests as small servers take at once.
_THREADS = 4
# A server that is not there need not be asked hundreds of times: after so many failures once in so many seconds.
_GIVE_UP, _PAUSE_SECONDS = 8, 10.0
_LOST = ("timeout", "refused")
# Has an answer that no judge gets wrong; whether it is right is not looked at.
_GREETING = Question("What is two and two?", "Four.", "Five.")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send replies, and the key, to somebody the user has not named."""

    def redirect_request(self, *_: Any) -> None:
        return None


class EndpointJudge:
    """Asks a chat-completions endpoint which of two replies is better.

    Args:
        url: the base, up to `/v1`.
        model: its name there.
        timeout_s: seconds for one answer, from the first byte sent to the last received.
        max_tokens: of a verdict.
    """

    fair = False

    def __init__(self, url: str, *, model: str = "default", timeout_s: float = 60.0, max_tokens: int = 16) -> None:
        self.name = url
        self._url = f"{check_url(url)}/chat/completions"
        self._model = model
        self._timeout_s = timeout_s
        self._max_tokens = max_tokens
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        self.local = is_loopback(url)
        """Whether nothing leaves this machine."""
        if self.local:
            # Whatever proxy the environment names, it has no business here.
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        # Questions are asked in several threads: a count that two of them read and write back would lose one.
        self._lock = threading.Lock()
        self._lost_in_a_row = 0
        self._asked_at = -math.inf

    @property
    def identity(self) -> str:
        """See `Judge`."""
        return f"{self.name} {self._model}, {self._max_tokens} tokens"

    @property
    def lost(self) -> bool:
        """See `Remote`."""
        return self._lost_in_a_row >= _GIVE_UP

    def find(self) -> None:
        """See `Loaded`: asks one question, whatever the answer; ModelError where none comes."""
        failure = self._ask(_GREETING).failure
        if failure is not None and failure != "unreadable":
            raise ModelError(
                f"`judge={self.name}`: {FAILURES[failure]}; start the server, or give another judge or address."
            )

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        """See `Judge`; never raises for what the endpoint does."""
        verdicts = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for verdict in pool.map(self.ask, questions):
                verdicts.append(verdict)
                progress(len(verdicts))
        return verdicts

    def ask(self, question: Question) -> Verdict:
        """The verdict on one question, or why there is none."""
        with self._lock:
            now = time.monotonic()
            if self.lost and now < self._asked_at + _PAUSE_SECONDS:
                return Verdict(None, "refused")
            self._asked_at = now
        verdict = self._ask(question)
        with self._lock:
            self._lost_in_a_row = self._lost_in_a_row + 1 if verdict.failure in _LOST else 0
        return verdict

    def _ask(self, question: Question) -> Verdict:
        try:
            answer = self._post(
                {
                    "model": self._model,
                    "messages": [{"role": "user", "content": "".join(text for text, _ in judge_parts(question))}],
                    "temperature": 0,
                    "max_tokens": self._max_tokens,
                }
            )
        except TimeoutError:
            return Verdict(None, "timeout")
        except (OSError, ValueError) as error:
            # urllib wraps a timeout while connecting into an URLError of its own.
            late = isinstance(getattr(error, "reason", None), TimeoutError)
            return Verdict(None, "timeout" if late else "refused")
        except Exception:  # http.client's own errors, of a server that does not speak HTTP.
            return Verdict(None, "refused")
        if len(answer) > MOST_BYTES:
            return Verdict(None, "too_long")
        said = content_of(answer)
        return Verdict(None, "malformed") if said is None else read_verdict(said)

    def _post(self, body: dict[str, Any]) -> bytes:
        """The answer's bytes, at most one more than are allowed; TimeoutError where it takes too long."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = os.environ.get(KEY_VARIABLE)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self._timeout_s
        parts: list[bytes] = []
        size = 0
        with self._opener.open(request, timeout=self._timeout_s) as response:
            while size <= MOST_BYTES:
                # The socket's timeout is for one read; a server that sends a byte a minute would never be late.
                if time.monotonic() > deadline:
                    raise TimeoutError
                # `read` would wait until a block is full, and the deadline would pass meanwhile.
                block = response.read1(_BLOCK)
                if not block:
                    break
                parts.append(block)
                size += len(block)
        return b"".join(parts)


def content_of(answer: bytes) -> str | None:
    """The text of a chat completion; None where the answer is something else."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    # RecursionError: a server may nest its JSON as deep as it likes.
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


def check_url(url: str) -> str:
    """The address of an endpoint without a slash at its end.

    Raises:
        ConfigError: it is no address of one.
    """
    try:
        parts = urlsplit(url)
        # A wrong port raises ValueError only here, where it is asked for, and not in `urlsplit`.
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    # The address is the judge's name, which is printed and written down: no place for a user's credentials.
    if not valid or parts.username or parts.query or parts.fragment:
        raise ConfigError(
            f"`judge={url}`: is no address of an endpoint; expected such as {LOOPBACK}, with the key, if any, in "
            f"{KEY_VARIABLE}."
        )
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

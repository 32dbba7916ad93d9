"""The page about a run, served on this machine's loopback address alone, from threads that the run never waits for."""

from __future__ import annotations

import json
import re
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from orpo_mlx.errors import ConfigError, UserError
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.live.feed import ENDED, PREPARING, Feed, Lines
from orpo_mlx.reporting.live.page import live_page

ADDRESS = "127.0.0.1"
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)
_PAGE = re.compile(r"[0-9a-f]{1,32}")
# Requests answered at one time; more are refused, so that no page can take the run's memory.
_MOST_THREADS = 32
# Between two looks whether the server is to end.
_POLL_S = 0.2
# The least time between two answers to one page.
_PACE_S = 0.5
# The longest a page is left without an answer when nothing happens.
_HOLD_S = 20.0
# The longest a run that has ended waits for its pages to hear of it.
_LINGER_S = 2.0
# Pages of other origins may neither read nor frame this one, and no browser keeps it.
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class LiveServer(ThreadingHTTPServer):
    """Serves the page of one run until it is closed.

    Args:
        feed: what the page shows.
        port: on the loopback address; 0 for any that is free.
        source: where the port was given, for errors.

    Raises:
        ConfigError: the port is taken, or not ours to take.
    """

    # A browser that holds connections open must not keep the run's process alive.
    daemon_threads = True
    request_queue_size = _MOST_THREADS

    def __init__(self, feed: Feed, port: int, source: str) -> None:
        self.feed = feed
        self._page = live_page(feed.folder.resolve().name).encode()
        self._ending = threading.Event()
        self._asked: dict[str, float] = {}
        self._free_threads = threading.BoundedSemaphore(_MOST_THREADS)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"{source} {port}: cannot be served on {ADDRESS} ({error.strerror}); give another port, or 0 for any "
                "that is free"
            ) from None
        self.address = f"http://{ADDRESS}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """As TCPServer does."""
        # HTTPServer looks up a host name besides, which may ask the network and wait for it.
        socketserver.TCPServer.server_bind(self)

    def close(self) -> None:
        """Tell the pages that are open that this was all, and end. Never raises an `Exception`."""
        with suppress(Exception):
            # First: answers that are held back end with it, and tell their pages that this was all.
            self._ending.set()
            ends = time.monotonic() + _LINGER_S
            while time.monotonic() < ends and self._pages_waiting():
                time.sleep(0.02)
            self.shutdown()
            self.server_close()

    def page(self) -> bytes:
        """The document."""
        return self._page

    def news(self, mark: str, page: str) -> tuple[bytes, bool]:
        """What is new after `mark`: a line of JSON, then lines of `metrics.jsonl` as they are; and whether that is all.

        Raises:
            OSError: the metrics cannot be read.
        """
        # It waits until there is something new, so that the page needs no timers: a browser lets them stand still in a
        # tab that is not seen.
        self._asked = {other: asked for other, asked in self._asked.items() if asked > self._long_ago()}
        self._asked[page] = time.monotonic()
        lines, facts = self._wait_for_news(mark)
        last = self._ending.is_set() and not lines.more
        head = {"mark": lines.mark, "again": lines.again, "more": lines.more, "last": last, **facts}
        return json.dumps(head).encode() + b"\n" + lines.content, last

    def forget(self, page: str) -> None:
        """Wait no longer for a page, which knows the end or is gone."""
        self._asked.pop(page, None)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a request in a thread of its own, or not at all where there are too many."""
        if not self._free_threads.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Count the thread out when it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_threads.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a page that went away, or whatever else happens here, is not the run's trouble."""

    def _wait_for_news(self, mark: str) -> tuple[Lines, dict[str, Any]]:
        first = self.feed.lines(mark)
        state = self.feed.facts()
        # A page that knows nothing yet, or has not caught up, is not kept waiting.
        if not mark or first.again or first.more:
            return first, state
        ends = time.monotonic() + _HOLD_S
        while not self._ending.wait(_PACE_S) and time.monotonic() < ends:
            lines = self.feed.lines(mark)
            facts = self.feed.facts()
            if lines.content or lines.again or any(facts[key] != state[key] for key in ("state", "total", "said")):
                return lines, facts
        return self.feed.lines(mark), self.feed.facts()

    def _pages_waiting(self) -> bool:
        # A copy: threads that answer pages change the table meanwhile.
        return any(asked > self._long_ago() for asked in list(self._asked.values()))

    def _long_ago(self) -> float:
        """A page that has not asked since then is gone."""
        return time.monotonic() - _HOLD_S - 2 * _PACE_S


class _Handler(BaseHTTPRequestHandler):
    """Two addresses, and nothing of the request but a mark and a page's number is looked at."""

    server: LiveServer
    timeout = 10.0

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host") or []
        # Another name than these, on this address, is a page from elsewhere that has had its name pointed here.
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].strip()):
            self.send_error(403)
            return
        url = urlsplit(self.path)
        if url.path == "/":
            self._send(200, "text/html", self.server.page())
        elif url.path != "/news":
            self.send_error(404)
        elif self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            self.send_error(403)
        else:
            self._send_news(parse_qs(url.query))

    def _send_news(self, query: dict[str, list[str]]) -> None:
        page = query.get("page", [""])[-1]
        if self.command == "HEAD" or not _PAGE.fullmatch(page):
            self._send(200, "application/json", b"")
            return
        try:
            content, last = self.server.news(query.get("after", [""])[-1], page)
        except OSError:
            self.send_error(500)
            return
        try:
            self._send(200, "application/json", content)
        except OSError:  # The page is gone.
            last = True
        if last:
            self.server.forget(page)

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        # The page brings its own policy along; nothing else is a document.
        policy = "frame-ancestors 'none'" if kind == "text/html" else "default-src 'none'; frame-ancestors 'none'"
        self.send_header("Content-Security-Policy", policy)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The number alone: nothing of the request is sent back."""
        self._send(code, "text/plain", b"")

    def version_string(self) -> str:
        return "orpo-mlx"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the run's."""


@contextmanager
def serving(feed: Feed, port: int, source: str) -> Iterator[LiveServer]:
    """Serve a run's page during a `with` block; its end is the last that the page hears.

    Raises:
        ConfigError: the port cannot be had.
    """
    server = LiveServer(feed, port, source)
    threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="live page", daemon=True).start()
    try:
        yield server
    finally:
        if feed.state is not None:
            feed.state = ENDED
        server.close()


@contextmanager
def watched(folder: Path, port: int | None, reporter: Reporter) -> Iterator[Feed]:
    """Serve the page about the run of this process in a `with` block, where `port` (`watch`) asks for that.

    Yields the feed, whose `state` the run keeps up to date.

    Raises:
        ConfigError: the port cannot be had.
    """
    feed = Feed(folder, lambda: list(reporter.said), PREPARING)
    if port is None:
        yield feed
        return
    with serving(feed, port, "`watch`") as server:
        reporter.say(f"On this machine, the run can be watched at {server.address}")
        try:
            yield feed
        except (UserError, KeyboardInterrupt) as error:
            # So that the page shows why the run ended; the terminal has it from who catches this.
            reporter.said.append(reporter.render(str(error)))
            raise

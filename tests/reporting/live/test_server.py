"""What the page's server lets in, what it tells, and that nothing of it reaches the run."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.errors import ConfigError
from orpo_mlx.reporting.live import server as live_server
from orpo_mlx.reporting.live.feed import GOING_ON, START, Feed
from orpo_mlx.reporting.live.server import LiveServer, serving
from tests.reporting.live.test_feed import record, report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record(tmp_path, {"total_steps": 4})
    (tmp_path / "metrics.jsonl").write_bytes(report(1, 1.0))
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    monkeypatch.setattr(live_server, "_PACE_S", 0.02)
    monkeypatch.setattr(live_server, "_POLL_S", 0.01)
    monkeypatch.setattr(live_server, "_LINGER_S", 0.02)
    with serving(Feed(folder, state=GOING_ON), 0, "--port") as found:
        yield found


def ask(
    server: LiveServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": "127.0.0.1", **headers}.items():
        if value:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, reply.headers, content


def news(server: LiveServer, mark: str = "", page: str = "ab") -> tuple[dict[str, Any], bytes]:
    status, _, content = ask(server, f"/news?page={page}&after={mark}")
    assert status == 200
    head, _, lines = content.partition(b"\n")
    return json.loads(head), lines


def test_it_listens_on_the_loopback_address_alone(server: LiveServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_address[1]}/"


def test_the_page(server: LiveServer, folder: Path) -> None:
    status, headers, content = ask(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Python" not in headers["Server"]
    assert f"<h1>Training: {folder.name}</h1>" in content.decode()
    again = ask(server, "/", "HEAD")
    assert (again[0], again[1]["Content-Length"], again[2]) == (200, str(len(content)), b"")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "127.0.0.1@evil", "0.0.0.0", "", "[::1]"],
)
@pytest.mark.parametrize("path", ["/", "/news?page=ab&after="])
def test_other_names_for_this_machine_are_refused(server: LiveServer, host: str, path: str) -> None:
    status, _, content = ask(server, path, Host=host)
    assert (status, content) == (403, b"")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "LOCALHOST", "localhost:65535"])
def test_its_own_names_are_let_in_at_any_port(server: LiveServer, host: str) -> None:
    """A tunnel from another machine ends at a port of its own."""
    assert ask(server, "/", Host=host)[0] == 200


def test_two_hosts_are_none(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 403 ")


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/../secret.txt",
        "/metrics.jsonl",
        "/run.json",
        "/news/",
        "/%2e%2e/secret.txt",
        "/news/../secret.txt",
        "/index.html",
        "/?/../secret.txt/..",
        "*",
        "http://evil.example/secret.txt",
    ],
)
def test_no_path_leads_to_a_file(server: LiveServer, path: str) -> None:
    status, _, content = ask(server, path)
    assert status == (200 if path.startswith("/?") else 404)
    assert b"secret" not in content


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "NONSENSE"])
def test_nothing_but_reading(server: LiveServer, method: str) -> None:
    status, _, content = ask(server, "/", method)
    assert (status, content) == (501, b"")


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_figures_are_for_the_page_itself(server: LiveServer, site: str) -> None:
    assert ask(server, "/news?page=ab&after=", Sec_Fetch_Site=site)[0] == 403
    assert ask(server, "/news?page=ab&after=", Sec_Fetch_Site="same-origin")[0] == 200
    # A link to the page may stand anywhere.
    assert ask(server, "/", Sec_Fetch_Site=site)[0] == 200


def test_news_go_on_from_the_mark(server: LiveServer, folder: Path) -> None:
    head, lines = news(server)
    assert (head["state"], head["total"], head["again"], head["more"], head["last"]) == (
        GOING_ON,
        4,
        False,
        False,
        False,
    )
    assert lines == report(1, 1.0)

    def append() -> None:
        # In one step, as a run appends: a file that is emptied first would be read as one that began anew.
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(report(2, 2.0))

    threading.Timer(0.2, append).start()
    head, lines = news(server, head["mark"])
    assert lines == report(2, 2.0)
    (folder / "metrics.jsonl").write_bytes(report(1, 3.0))
    head, lines = news(server, head["mark"])
    assert (head["again"], lines) == (True, report(1, 3.0))


def test_without_news_an_answer_comes_in_the_end(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_server, "_HOLD_S", 0.2)
    head, _ = news(server)
    begin = time.monotonic()
    assert news(server, head["mark"])[1] == b""
    assert 0.1 < time.monotonic() - begin < 10


def test_a_state_that_changes_is_news(server: LiveServer) -> None:
    head, _ = news(server)
    threading.Timer(0.2, lambda: setattr(server.feed, "state", "preparing")).start()
    assert news(server, head["mark"])[0]["state"] == "preparing"


@pytest.mark.parametrize("query", ["", "?page=", "?page=../x&after=", f"?page={'a' * 33}"])
def test_what_is_no_page_is_told_nothing(server: LiveServer, query: str) -> None:
    assert ask(server, f"/news{query}")[2] == b""


def test_metrics_that_cannot_be_read(server: LiveServer, folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    assert ask(server, "/news?page=ab&after=")[0] == 500


def test_the_end_is_told_with_the_last_lines(folder: Path) -> None:
    heard: list[tuple[dict[str, Any], bytes]] = []
    with serving(Feed(folder, state=GOING_ON), 0, "--port") as server:
        head, _ = news(server)
        page = threading.Thread(target=lambda: heard.append(news(server, head["mark"])))
        page.start()
        time.sleep(0.1)
        # Between this and the end lies less than the pace at which pages are told.
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(report(4, 1.0))
    page.join()
    ((end, lines),) = heard
    assert (end["state"], end["last"], lines) == ("ended", True, report(4, 1.0))
    with pytest.raises(ConnectionRefusedError):
        news(server)


def test_a_page_that_is_gone_delays_the_end_by_little_and_none_by_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_server, "_LINGER_S", 1.0)
    for asks in (True, False):
        with serving(Feed(folder, state=GOING_ON), 0, "--port") as server:
            if asks:
                news(server)
            begin = time.monotonic()
        took = time.monotonic() - begin
        assert 1.0 <= took < 10 if asks else took < 1.0


def test_faults_stay_inside(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fault() -> dict[str, Any]:
        raise RuntimeError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(server.feed, "facts", fault)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            news(server)
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\xff\xff nonsense \r\n\r\n")
        connection.recv(1000)
    assert news(server)[1] == report(1, 1.0)
    assert capfd.readouterr() == ("", "")


def test_too_many_at_once_are_turned_away(server: LiveServer) -> None:
    held = [
        socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10)
        for _ in range(live_server._MOST_THREADS)
    ]
    time.sleep(0.2)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        ask(server, "/")
    for connection in held:
        connection.close()
    ends = time.monotonic() + 10
    while True:
        try:
            assert ask(server, "/")[0] == 200
            return
        except (http.client.RemoteDisconnected, ConnectionResetError):
            assert time.monotonic() < ends


def test_a_port_that_is_taken_is_one_sentence(server: LiveServer, folder: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(
        ConfigError, match=rf"^`watch` {port}: cannot be served on 127.0.0.1 \(Address already in use\)"
    ):
        LiveServer(Feed(folder), int(port), "`watch`")


def test_a_mark_of_nothing_waits_as_well(server: LiveServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a report yet is not asked again and again."""
    monkeypatch.setattr(live_server, "_HOLD_S", 0.3)
    (folder / "metrics.jsonl").unlink()
    head, _ = news(server)
    assert head["mark"] == START
    begin = time.monotonic()
    news(server, head["mark"])
    assert time.monotonic() - begin > 0.2

"""Clients that take their time, by raw sockets: whoever stands still keeps nobody else out, and holds little."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fixtures.serving import FAKE, Host, answer, host_in_thread, received, stop, until

from weighbridge.hosts.blame import Blame
from weighbridge.hosts.children import Child

BODY = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[3]}]}'
CHUNKED = b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
STALL, CONNECTIONS, MEGABYTE = 1.0, 16, 1 << 20
SHORT = FAKE.model_copy(
    update={
        "header_seconds": STALL,
        "stall_seconds": STALL,
        "request_seconds": 2.0,
        "connections": CONNECTIONS,
        "connections_per_address": CONNECTIONS,
        "held_bytes": 3 * MEGABYTE,
        "held_bytes_per_address": 2 * MEGABYTE,
    }
)
LARGE = FAKE.model_copy(
    update={"stall_seconds": STALL, "idle_seconds": STALL, "request_seconds": 60.0, "max_body_bytes": 64 * MEGABYTE}
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Little patience, few connections, little room."""
    with host_in_thread(tmp_path_factory.mktemp("blobs"), SHORT) as host:
        yield host


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The bodies that a host takes by default."""
    with host_in_thread(tmp_path_factory.mktemp("blobs"), LARGE) as host:
        yield host


def head(length: int, more: str = "", path: str = "/v2/models/scale/infer") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def ask(host: Host, body: bytes = BODY, more: str = "") -> int:
    with host.connect() as sock:
        sock.sendall(head(len(body), more) + body)
        return answer(sock)[0]


def padded(size: int) -> bytes:
    return BODY + b" " * (size - len(BODY))


def child_of(host: Host) -> Child:
    child = host.slots.find("scale", None).child
    assert child is not None
    return child


@pytest.mark.parametrize(
    "first", [b"", b"POST /v2/mod", head(100), head(100) + b"{"], ids=["silent", "half", "no", "some"]
)
def test_half_open_connections_lock_nobody_out(host: Host, first: bytes) -> None:
    """Three times as many as there may be: the oldest make room, and a good client is answered in between."""
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(3 * CONNECTIONS):
            socks.append(stack.enter_context(host.connect()))
            socks[-1].sendall(first)
        assert ask(host) == 200
        for sock in socks[: 2 * CONNECTIONS]:
            assert answer(sock)[0] in (0, 503)


def test_a_connection_that_is_answered_is_not_ended_for_another(host: Host) -> None:
    """Its request is here whole: it waits for us. Newcomers are told to come again."""
    with contextlib.ExitStack() as stack:
        process = asyncio.run(stop(child_of(host)))
        stack.callback(process.resume)
        socks = [stack.enter_context(host.connect()) for _ in range(CONNECTIONS)]
        for sock in socks:
            sock.sendall(head(len(BODY)) + BODY)
        asyncio.run(until(lambda: child_of(host).waiting >= CONNECTIONS))
        newcomer = stack.enter_context(host.connect())
        status, headers, body = answer(newcomer)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "connections" in json.loads(body)["error"]
        process.resume()
        assert {answer(sock)[0] for sock in socks} == {200}


@pytest.mark.parametrize("chunked", [False, True])
def test_last_bytes_that_are_held_back_hold_little(host: Host, chunked: bool) -> None:
    """A dozen clients with a megabyte each: two fit, the others are refused, and soon make room for one who goes on."""
    whole = padded(MEGABYTE)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(host.connect()) for _ in range(12)]
        begin = CHUNKED + b"%x\r\n" % len(whole) if chunked else head(len(whole))
        for sock in socks:
            sock.sendall(begin + whole[:-1])
        answers = [answer(sock) for sock in socks]
        refused = [headers for status, headers, _ in answers if status in (429, 503)]
        assert len(refused) >= 10
        assert all(headers["retry-after"] == "1" for headers in refused)
        assert {status for status, _, _ in answers} <= {408, 429, 503}
    assert ask(host, whole) == 200


def test_one_that_stands_still_makes_room_for_one_that_goes_on(roomy: Host, tmp_path: Path) -> None:
    """Long before its own time is up: what it announced is reserved, and given to whoever needs it."""
    patient = SHORT.model_copy(update={"stall_seconds": 60.0})
    whole = padded(MEGABYTE)
    with host_in_thread(tmp_path, patient) as host, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(host.connect()) for _ in range(2)]
        for sock in socks:
            sock.sendall(head(len(whole)) + b"{")
        began = time.monotonic()
        while (status := ask(host, whole)) == 429:
            assert time.monotonic() - began < 20
        assert status == 200
        assert answer(socks[0])[0] == 408


def test_what_drips_in_wins_nothing(host: Host) -> None:
    """A byte now and then is no progress; an empty line on an idle connection is none either."""
    for first, drip, statuses in [(head(1000), b" ", (408,)), (head(len(BODY)) + BODY, b"\r\n", (200,))]:
        with host.connect() as sock:
            began = time.monotonic()
            sock.sendall(first)
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - began < 10 * STALL:
                    sock.sendall(drip)
                    time.sleep(0.05)
            assert time.monotonic() - began < 9 * STALL
            assert answer(sock)[0] in (*statuses, 0)


def test_a_slow_but_honest_upload_is_answered(host: Host) -> None:
    """It takes longer than any deadline has seconds, and goes on all the time."""
    whole = padded(12 << 16)
    with host.connect() as sock:
        began = time.monotonic()
        sock.sendall(head(len(whole)))
        for at in range(0, len(whole), 1 << 16):
            time.sleep(0.25)
            sock.sendall(whole[at : at + (1 << 16)])
        assert answer(sock)[0] == 200
    assert time.monotonic() - began > SHORT.request_seconds > SHORT.stall_seconds


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models/other/infer", 404),
        ("/v2/models/scale/versions/9/infer", 404),
        ("/v2/models/scale/infer/", 404),
        ("/v2/health/live", 405),
    ],
)
def test_who_asks_for_nothing_here_is_told_before_the_body(roomy: Host, path: str, status: int) -> None:
    """None of it is waited for; what comes all the same is thrown away, and the connection ends."""
    with roomy.connect() as sock:
        sock.sendall(head(64 * MEGABYTE, path=path))
        assert answer(sock)[0] == status
    before = psutil.Process().memory_info().rss
    with roomy.connect() as sock:
        sock.sendall(head(32 * MEGABYTE, path=path))
        for _ in range(32):
            sock.sendall(bytes(MEGABYTE))
        assert answer(sock)[0] == status
    assert psutil.Process().memory_info().rss - before < 16 * MEGABYTE


def test_an_answer_that_nobody_takes_is_let_go(roomy: Host) -> None:
    """It is no more held than a body that does not come: the connection ends."""
    size = 24 * MEGABYTE
    tensor = {"name": "x", "shape": [size // 16, 4], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    with roomy.connect(receive_buffer=4096) as sock:
        sock.sendall(head(len(text) + size, f"Inference-Header-Content-Length: {len(text)}\r\n") + text)
        for _ in range(size // MEGABYTE):
            sock.sendall(bytes(MEGABYTE))
        assert sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        asyncio.run(until(lambda: connections_to(roomy) == 0))
        _, headers, body = answer(sock)
        assert len(body) < int(headers["content-length"])


def connections_to(host: Host) -> int:
    """Established connections whose server side still exists."""
    port = int(host.url.split(":")[1])
    found = psutil.Process().net_connections("tcp")
    return sum(1 for one in found if one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED)


def test_who_leaves_is_not_computed_for(roomy: Host) -> None:
    """What the engine child has not got yet is dropped; what it has is answered to nobody, and counted."""
    child, count = child_of(roomy), 40
    slot = roomy.slots.find("scale", None)
    before = slot.statistics.blamed[Blame.CLIENT]
    process = asyncio.run(stop(child))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                sock = stack.enter_context(roomy.connect())
                sock.sendall(head(len(BODY)) + BODY)
            asyncio.run(until(lambda: child.waiting >= count - 1))
        asyncio.run(until(lambda: child.waiting <= 10))
    finally:
        process.resume()
    asyncio.run(until(lambda: child.waiting == 0))
    assert ask(roomy) == 200
    assert slot.statistics.blamed[Blame.CLIENT] - before >= count - 10


def test_who_leaves_in_the_middle_of_a_body_frees_what_it_held(host: Host) -> None:
    """At once: the next one finds the room that it had."""
    whole = padded(MEGABYTE)
    for _ in range(6):
        with host.connect() as sock:
            sock.sendall(head(len(whole)) + whole[: MEGABYTE // 2])
    for _ in range(4):
        while (status := ask(host, whole)) == 429:  # until the host has heard of it
            time.sleep(0.01)
        assert status == 200


def test_a_bomb_reaches_no_engine_child(roomy: Host) -> None:
    """64 KB of gzip that are 64 MB of JSON: 413, and nobody's memory grows by much."""
    tensor = b'{"inputs":[{"name":"x","shape":[%d],"datatype":"FP64","data":[0%b]}]}'
    count = 31 * MEGABYTE
    bomb = gzip.compress(tensor % (count, b",0" * (count - 1)), 9)
    assert len(bomb) < 1 << 17
    child, own = peak(child_of(roomy).pid), peak()
    for _ in range(3):
        assert ask(roomy, bomb, "Content-Encoding: gzip\r\n") == 413
    assert peak(child_of(roomy).pid) - child < 16 * MEGABYTE
    assert peak() - own < 64 * MEGABYTE
    assert ask(roomy, gzip.compress(padded(MEGABYTE // 2)), "Content-Encoding: gzip\r\n") == 200


def peak(pid: int | None = None) -> int:
    """The most that a process ever held, bytes."""
    text = Path(f"/proc/{pid or 'self'}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n", (400, 431)),
        (b"GET /v2 HTTP/1.1\r\nx: " + b"a" * (8 * MEGABYTE), (400, 431, 0)),
        (b"GET /" + b"a" * (8 * MEGABYTE), (400, 431, 0)),
        (b"GET /v2 HTTP/1.1\r\n\r\n" * 5000, (200, 400)),
        (CHUNKED + b"1;" + b"e" * (8 * MEGABYTE), (0,)),
        (CHUNKED + b"0\r\nx: " + b"t" * (8 * MEGABYTE), (0,)),
    ],
    ids=["headers", "header", "path", "pipelined", "extension", "trailer"],
)  # fmt: skip
def test_what_is_not_body_is_bounded_too(roomy: Host, sent: bytes, statuses: tuple[int, ...]) -> None:
    """Headers, paths, frames of chunks, requests before their answers: the connection ends soon."""
    before = peak()
    with roomy.connect() as sock:
        sending = threading.Thread(target=lambda: push(sock, sent))
        sending.start()
        assert answer(sock)[0] in statuses
        while received(sock):
            pass
        sending.join()
    assert peak() - before < 48 * MEGABYTE
    assert ask(roomy) == 200


def push(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Host: evil.example\r\n", 421),
        ("Host: evil.example:8500\r\n", 421),
        ("Host: localhost\r\nHost: evil.example\r\n", 400),
        ("Host: localhost\r\nOrigin: http://evil.example\r\n", 403),
        ("Host: localhost\r\nOrigin: null\r\n", 403),
        ("Host: 10.1.2.3:8500\r\n", 200),
        ("Host: localhost\r\n", 200),
        ("", 200),
    ],
)
@pytest.mark.parametrize(
    "line", ["GET /metrics", "GET /v2/health/ready", "GET /v2/models/scale", "POST /v2/repository/index"]
)
def test_names_and_pages_that_the_host_does_not_know(host: Host, line: str, headers: str, status: int) -> None:
    """On every route: a page elsewhere reads no metrics either. A health check by address goes through."""
    with host.connect() as sock:
        sock.sendall(f"{line} HTTP/1.1\r\n{headers}Content-Length: 0\r\n\r\n".encode())
        told, answered, body = answer(sock)
    assert told == status
    assert not any(name.startswith("access-control") for name in answered)
    if status != 200:
        assert json.loads(body)["error"]

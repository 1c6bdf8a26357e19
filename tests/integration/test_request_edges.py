"""Requests at the edges of HTTP, by raw sockets: numbers nobody means, bodies that do not come, methods, encodings."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fixtures.serving import FAKE, Host, answer, host_in_thread, serving_host

SECONDS = 1.5
BODY = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[3]}]}'
QUICK = FAKE.model_copy(update={"header_seconds": SECONDS, "stall_seconds": SECONDS, "queue": 8, "held_bytes": 3 << 19})


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with short deadlines, a short queue and little room for bodies."""
    with host_in_thread(tmp_path_factory.mktemp("blobs"), QUICK) as host:
        yield host


def ask(host: Host, headers: str = "", body: bytes = BODY, length: str | None = None) -> int:
    size = str(len(body)) if length is None else length
    with host.connect() as sock:
        head = f"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n{headers}\r\n"
        sock.sendall(head.encode() + body)
        return answer(sock)[0]


NUMBERS = [
    "99999999999999999999", "18446744073709551616", "9223372036854775808", "4294967296", "-1", "+2", "2.0", "2e1",
    "0x10", "", " ", "1_0", "٣", "1,1", "NaN", "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_nobody_means_is_refused_and_forgotten(quick: Host, number: str) -> None:
    """Far more often than the queue is long: every answer is a 4xx, and the next request is served."""
    for _ in range(QUICK.queue + 2):
        with quick.connect() as sock:
            head = f"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nContent-Length: {len(BODY)}\r\n"
            head += f"Inference-Header-Content-Length: {number}\r\n\r\n"
            sock.sendall(head.encode() + BODY)
            assert answer(sock)[0] in (400, 413)
    assert ask(quick) == 200
    child = quick.slots.find("scale", None).child
    assert child is not None
    assert child.waiting == 0


@pytest.mark.parametrize("length", [*NUMBERS, "1048577"])
def test_a_length_of_the_body_that_cannot_be(quick: Host, length: str) -> None:
    """Refused before the body is waited for, or with the connection by the parser; the host serves on."""
    if length.strip():
        assert ask(quick, body=b"", length=length) in (400, 413)
    assert ask(quick) == 200


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**63]},
        {"shape": [2**64]},
        {"shape": [10**30]},
        {"shape": [-1]},
        {"shape": [2**31, 2**31, 2**31]},
        {"shape": [0, 2**62]},
        {"shape": [1] * 33},
        {"shape": [1.0]},
        {"shape": [True]},
        {"shape": ["1"]},
        {"shape": {}},
        {"data": [10**40], "datatype": "INT64"},
        {"data": [2**63], "datatype": "INT64"},
        {"data": [-1], "datatype": "UINT64"},
        {"data": [1e400], "datatype": "FP32"},
        {"data": [1e39], "datatype": "FP32"},
        {"parameters": {"binary_data_size": 2**64}},
        {"parameters": {"binary_data_size": -4}},
        {"parameters": {"binary_data_size": 4.0}},
        {"parameters": {"binary_data_size": 4}, "shape": [2**62]},
        {"parameters": []},
    ],
)
def test_numbers_inside_the_json(quick: Host, change: dict[str, object]) -> None:
    """400 whatever they claim, and nothing is made by the claim."""
    tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [3], **change}
    body = json.dumps({"inputs": [tensor]}).replace("Infinity", "1e400").encode()
    expected = (400, 200) if change.get("parameters") == [] else (400,)
    assert ask(quick, body=body) in expected
    assert ask(quick) == 200


@pytest.mark.parametrize("more", [{"id": 2**70}, {"id": ["a"]}, {"parameters": {"binary_data_output": 1}}])
def test_numbers_beside_the_inputs(quick: Host, more: dict[str, object]) -> None:
    """An id is a string, a flag is a flag."""
    assert ask(quick, body=json.dumps({**json.loads(BODY), **more}).encode()) == 400


@pytest.mark.parametrize("parameters", [{"priority": 2**70}, {"timeout": -1}, {"timeout": "x"}, {"sequence_id": 2**64}])
def test_parameters_that_this_server_does_not_know_change_nothing(quick: Host, parameters: dict[str, object]) -> None:
    """Triton's own: whatever their value, they are not read."""
    assert ask(quick, body=json.dumps({**json.loads(BODY), "parameters": parameters}).encode()) == 200


@pytest.mark.parametrize(
    ("first", "drip", "status"),
    [
        (b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n", b"", 408),
        (b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{", b"", 408),
        (b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n", b" ", 408),
        (b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 408),
        (
            b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
            b"",
            100,
        ),
        (b"POST /v2/models/scale/infer HT", b"", 408),
        (b"GET /v2 HTTP/1.1\r\nX-Long: ", b"x", 408),
        (b"", b"", 0),
        (b"PUT /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n", b" ", 405),
    ],
)
@pytest.mark.slow
def test_what_does_not_come_ends_with_its_deadline(quick: Host, first: bytes, drip: bytes, status: int) -> None:
    """Headers have one deadline, a body must go on: bytes that drip in move neither, and the connection ends."""
    began = time.monotonic()
    with quick.connect() as sock:
        sock.sendall(first)
        stop = threading.Event()

        def drop() -> None:
            while drip and not stop.wait(0.1):
                try:
                    sock.sendall(drip)
                except OSError:
                    return

        dropping = threading.Thread(target=drop)
        dropping.start()
        try:
            assert answer(sock)[0] == status
            while True:
                try:
                    if not sock.recv(65536):
                        break
                except ConnectionResetError:
                    break
        finally:
            stop.set()
            dropping.join()
    assert time.monotonic() - began > SECONDS * 0.5
    assert ask(quick) == 200


def test_bodies_that_are_held_are_bounded_in_sum(quick: Host) -> None:
    """Slow uploads together may not fill the memory: beyond `held_bytes` the answer is 503, and they are let go."""
    part, size = bytes(200_000), 900_000
    socks = [quick.connect() for _ in range(4)]
    try:
        for sock in socks:
            head = f"POST /v2/models/scale/infer HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n"
            sock.sendall(head.encode() + part)
        answers = [answer(sock) for sock in socks]
    finally:
        for sock in socks:
            sock.close()
    assert {status for status, _, _ in answers} == {503, 408}
    assert all(headers.get("retry-after") == "1" for status, headers, _ in answers if status == 503)
    assert ask(quick) == 200


def gzipped(*parts: bytes) -> bytes:
    return b"".join(gzip.compress(part) for part in parts)


RAW = zlib.compressobj(wbits=-15)
RAW_DEFLATE = RAW.compress(BODY) + RAW.flush()


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzipped(BODY), 200),
        ("x-gzip", gzipped(BODY), 200),
        ("GZIP", gzipped(BODY), 200),
        ("gzip", gzipped(BODY[:20], b"", BODY[20:]), 200),
        ("gzip", gzipped(BODY) + bytes(512), 200),
        ("identity", BODY, 200),
        ("gzip, identity", gzipped(BODY), 200),
        ("deflate", zlib.compress(BODY), 200),
        ("deflate", RAW_DEFLATE, 200),
        ("deflate", zlib.compress(BODY) + b"more", 400),
        ("gzip", gzipped(BODY) + b"more", 400),
        ("gzip", gzipped(BODY)[:-4], 400),
        ("gzip", gzipped(BODY) + gzipped(BODY)[:30], 400),
        ("gzip", BODY, 400),
        ("gzip", b"", 400),
        ("gzip", b"".join([gzip.compress(b"")] * 3000), 400),
        ("gzip", gzip.compress(bytes(QUICK.max_body_bytes + 1)), 413),
        ("gzip, gzip", gzip.compress(gzipped(BODY)), 415),
        ("deflate, gzip", gzip.compress(zlib.compress(BODY)), 415),
        ("br", BODY, 415),
        ("zstd", BODY, 415),
        ("compress", BODY, 415),
        ("gzip;q=1", BODY, 415),
    ],
)
def test_content_encodings(quick: Host, encoding: str, body: bytes, status: int) -> None:
    """Every form that clients send is undone within the body's bound; what is unknown or broken is told."""
    assert ask(quick, f"Content-Encoding: {encoding}\r\n", body) == status
    assert ask(quick) == 200


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/scale", "/metrics"])
def test_head_is_get_without_its_body(quick: Host, path: str) -> None:
    """Load balancers ask so: the same status and headers, on a connection that goes on."""
    with httpx.Client(base_url=f"http://{quick.url}") as http:
        full, bare = http.get(path), http.head(path)
        assert (bare.status_code, bare.content) == (full.status_code, b"")
        if path != "/metrics":  # what it says changes with every request
            assert bare.headers["content-length"] == full.headers["content-length"]
        assert http.get("/v2/health/live").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("OPTIONS", "/v2/models/scale/infer", "POST"),
        ("GET", "/v2/models/scale/infer", "POST"),
        ("DELETE", "/v2/models/scale", "GET, HEAD"),
        ("POST", "/v2/health/ready", "GET, HEAD"),
        ("GET", "/v2/repository/index", "POST"),
    ],
)
def test_a_method_that_is_not_for_a_path(quick: Host, method: str, path: str, allow: str) -> None:
    """405 says which are, as RFC 9110 demands."""
    with httpx.Client(base_url=f"http://{quick.url}") as http:
        told = http.request(method, path)
        assert (told.status_code, told.headers["allow"]) == (405, allow)


def test_what_is_unavailable_says_when_to_come_again(tmp_path: Path) -> None:
    """503 with Retry-After while a host does not know yet what it serves, and for what it is bringing up; then 404."""

    async def run() -> None:
        async with serving_host(tmp_path) as host, httpx.AsyncClient(base_url=f"http://{host.url}") as http:

            async def told() -> tuple[int, str | None]:
                answer = await http.post("/v2/models/scale/infer", content=BODY)
                return answer.status_code, answer.headers.get("retry-after")

            host.slots.expected, host.slots.certain = None, False
            assert await told() == (503, "1")
            host.slots.assign(frozenset(), certain=False)  # what was wanted last time, from the disk
            assert await told() == (503, "1")
            host.slots.assign(frozenset({"scale"}), certain=True)
            assert await told() == (503, "1")
            await host.put_live("2")
            assert await told() == (200, None)
            assert (await http.post("/v2/models/other/infer", content=BODY)).status_code == 404

    asyncio.run(run())

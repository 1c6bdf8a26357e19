"""A small HTTP/1.1 load generator: keep-alive connections, one fixed request, closed loop or open loop.

    python benchmarks/http_load.py 127.0.0.1:8080 /v2/models/mlp/infer --body body.json --connections 8 --seconds 6
    python benchmarks/http_load.py 127.0.0.1:8080 /v2/models/mlp/infer --body body.json --rate 100 --seconds 6

It prints one JSON line. In the open loop a latency counts from the moment at which the request was due, so that a stall
shows in every request that it delayed. The first `--skip` seconds are not counted.
An interrupt ends the open loop early.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass
class Results:
    """When each answered request was due and how long it took from then, seconds; and every failure."""

    due: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, due: float, status: bytes) -> None:
        if status == b"200":
            self.due.append(due)
            self.latencies.append(time.perf_counter() - due)
        else:
            self.failures.append(status.decode())

    def summary(self, since: float) -> dict[str, object]:
        """Percentiles in milliseconds of what was due after `since`."""
        kept = sorted(taken for due, taken in zip(self.due, self.latencies, strict=True) if due >= since)
        span = (max(self.due) - since) if kept else 1.0
        at = {
            f"p{quantile:g}": kept[min(len(kept) - 1, int(len(kept) * quantile / 100))] * 1e3 if kept else None
            for quantile in (50, 95, 99, 99.9, 100)
        }
        return {
            "requests": len(kept),
            "per_second": len(kept) / span,
            "failures": len(self.failures),
            "first_failures": self.failures[:3],
            **at,
        }


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[bytes] | None = None
        self._held = b""
        self._end = 0
        self._status = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        """Send; the future ends with the status, or `lost`."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._held = self._held + data if self._held else data
        if not self._end:
            if (head := self._held.find(b"\r\n\r\n")) < 0:
                return
            length = _LENGTH.search(self._held, 0, head)
            self._status, self._end = self._held[9:12], head + 4 + int(length[1] if length else 0)
        if len(self._held) >= self._end and self._answer is not None:
            answer, self._answer, self._held, self._end = self._answer, None, b"", 0
            answer.set_result(self._status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(b"lost")

    def close(self) -> None:
        self._transport.close()


def build_request(host: str, path: str, body: bytes, headers: tuple[str, ...] = ()) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def connect(address: str) -> Connection:
    host, _, port = address.rpartition(":")
    return (await asyncio.get_running_loop().create_connection(Connection, host, int(port)))[1]


async def closed_loop(address: str, request: bytes, connections: int, seconds: float) -> Results:
    """Each connection sends its next request when it has the answer to the last."""
    results, end = Results(), time.perf_counter() + seconds

    async def drive() -> None:
        connection = await connect(address)
        while (began := time.perf_counter()) < end:
            status = await connection.ask(request)
            results.add(began, status)
            if status == b"lost":
                connection = await connect(address)
        connection.close()

    await asyncio.gather(*(drive() for _ in range(connections)))
    return results


async def open_loop(address: str, request: bytes, rate: float, seconds: float) -> Results:
    """Requests are due at a fixed rate whatever the answers do; each takes a free connection or opens one."""
    results, free = Results(), [await connect(address)]
    waiting: set[asyncio.Task[None]] = set()

    async def one(due: float) -> None:
        try:
            connection = free.pop() if free else await connect(address)
            status = await connection.ask(request)
        except (OSError, RuntimeError):  # refused, or closed while it was free
            status = b"refused"
        results.add(due, status)
        if status not in (b"lost", b"refused"):
            free.append(connection)

    began, stopped = time.perf_counter(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stopped.set)
    for number in range(int(rate * seconds)):
        if stopped.is_set():
            break
        due = began + number / rate
        if (ahead := due - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        task = asyncio.create_task(one(due))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    await asyncio.gather(*waiting)
    for connection in free:
        connection.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="host:port")
    parser.add_argument("path")
    parser.add_argument("--body", type=Path, required=True)
    parser.add_argument("--header", action="append", default=[], help="an extra `Name: value`")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rate", type=float, help="requests/s; makes it an open loop")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--skip", type=float, default=0.5)
    parser.add_argument("--latencies", type=Path, help="write every [due, latency] to this JSON file, seconds")
    options = parser.parse_args()
    request = build_request(options.address, options.path, options.body.read_bytes(), tuple(options.header))
    began = time.perf_counter()
    loop = (
        open_loop(options.address, request, options.rate, options.seconds)
        if options.rate
        else closed_loop(options.address, request, options.connections, options.seconds)
    )
    results = uvloop.run(loop)
    summary = results.summary(began + options.skip)
    if options.latencies:
        options.latencies.write_text(json.dumps(list(zip(results.due, results.latencies, strict=True))))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

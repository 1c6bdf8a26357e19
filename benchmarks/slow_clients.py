"""What clients that mean no good cost a host and a good client beside them: memory of front and children, latency.

    python benchmarks/slow_clients.py [--seconds 8]

The MLP of benchmarks/mlp_host.py with the settings that a host has by default. Each kind of bad client runs for some
seconds beside a good one that asks fifty times a second on connections of its own. Peaks are the kernel's (VmHWM, begun
anew for each row where that is allowed). All of them come from one address, this machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

HERE = Path(__file__).parent
PATH = "/v2/models/mlp/infer"
LARGEST = 64 << 20
Sockets = list[socket.socket]


class Good(NamedTuple):
    """What the good client saw: seconds of each answer, and how many it did not get."""

    seconds: list[float]
    failures: int


class Server(NamedTuple):
    url: str
    pid: int

    def connect(self) -> socket.socket:
        address, port = self.url.split(":")
        return socket.create_connection((address, int(port)), timeout=30)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    host = subprocess.Popen(
        [sys.executable, str(HERE / "mlp_host.py"), "--data", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert host.stdout is not None
    try:
        yield Server(json.loads(host.stdout.readline())["url"], host.pid)
    finally:
        host.communicate()


def head(length: int, more: str = "") -> bytes:
    return f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def nobody(server: Server, held: Sockets) -> None:
    pass


def held_back(server: Server, held: Sockets) -> None:
    """Forty clients that hold back the last byte of a body of 64 MiB."""
    for _ in range(40):
        sock = server.connect()
        held.append(sock)
        with contextlib.suppress(OSError):
            sock.sendall(head(LARGEST))
            for _ in range(63):
                sock.sendall(bytes(1 << 20))
            sock.sendall(bytes((1 << 20) - 1))


def half_open(server: Server, held: Sockets) -> None:
    """1,001 connections that say the half of a request line."""
    for _ in range(1001):
        sock = server.connect()
        held.append(sock)
        with contextlib.suppress(OSError):
            sock.sendall(b"POST /v2/mod")


def not_taken(server: Server, held: Sockets) -> None:
    """Forty clients that ask for the metrics a thousand times and read nothing."""
    for _ in range(40):
        sock = server.connect()
        held.append(sock)
        with contextlib.suppress(OSError):
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)


def bombs(server: Server, held: Sockets) -> None:
    """64 KB of gzip that are 64 MB of JSON, a hundred times."""
    count = 31 << 20
    text = b'{"inputs":[{"name":"x","shape":[%d],"datatype":"FP64","data":[0%b]}]}'
    bomb = gzip.compress(text % (count, b",0" * (count - 1)))
    for _ in range(100):
        with server.connect() as sock, contextlib.suppress(OSError):
            sock.sendall(head(len(bomb), "Content-Encoding: gzip\r\n") + bomb)
            sock.recv(1 << 16)


def nested(server: Server, held: Sockets) -> None:
    """JSON of 60 MB that is nothing but empty lists, twenty times."""
    body = b'{"inputs":[' + b"[]," * (20 << 20) + b"[]]}"
    for _ in range(20):
        with server.connect() as sock, contextlib.suppress(OSError):
            sock.sendall(head(len(body)) + body)
            sock.recv(1 << 16)


KINDS: dict[str, Callable[[Server, Sockets], None]] = {
    "nobody": nobody,
    "40 hold back the last byte of 64 MiB": held_back,
    "1,001 half-open connections": half_open,
    "40 take no answers": not_taken,
    "100 gzip bombs, 64 KB to 64 MB": bombs,
    "20 times 60 MB of empty lists": nested,
}


def ask_for(server: Server, body: bytes, seconds: float) -> Good:
    """Ask fifty times a second, each time on a new connection."""
    times, failures, until = list[float](), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        try:
            with server.connect() as sock:
                sock.sendall(head(len(body)) + body)
                failures += not sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
        except OSError:
            failures += 1
        times.append(time.perf_counter() - began)
        time.sleep(max(0.0, 0.02 - times[-1]))
    return Good(times, failures)


def processes(server: Server) -> tuple[psutil.Process, list[psutil.Process]]:
    front = psutil.Process(server.pid)
    return front, front.children(recursive=True)


def begin_anew(server: Server) -> None:
    front, children = processes(server)
    for process in (front, *children):
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak(process: psutil.Process) -> float:
    """MB."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process.pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) / 1000
    return 0.0


def measure(server: Server, bad: Callable[[Server, Sockets], None], body: bytes, seconds: float) -> str:
    begin_anew(server)
    held: Sockets = []
    begun = threading.Thread(target=bad, args=(server, held))
    begun.start()
    good = ask_for(server, body, seconds)
    begun.join()
    front, children = processes(server)
    sizes = peak(front), max(map(peak, children))
    for sock in held:
        sock.close()
    ordered = sorted(good.seconds)
    p99 = ordered[int(len(ordered) * 0.99)]
    cells = statistics.median(ordered), p99, ordered[-1]
    latency = " / ".join(f"{1000 * value:.1f}" for value in cells)
    return f"{sizes[0]:,.0f} | {sizes[1]:,.0f} | {len(ordered)} | {good.failures} | {latency}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        subprocess.run([sys.executable, str(HERE / "mlp_host.py"), "--data", folder, "--build"], check=True)
        body = (data / "body.json").read_bytes()
        with running(data) as server:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            print("| beside a good client | front, peak MB | child, peak MB | asked | failed | p50 / p99 / worst ms |")
            print("|---|---|---|---|---|---|")
            for name, bad in KINDS.items():
                print(f"| {name} | {measure(server, bad, body, options.seconds)} |", flush=True)


if __name__ == "__main__":
    main()

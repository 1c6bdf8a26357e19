"""Swaps under constant load: failed requests, and the worst request over the steady p99.

    python benchmarks/swap.py [--swaps 20] [--rate 100]

An open loop sends at a fixed rate; every latency counts from the moment the request was due. First a steady run, then
one during which the host loads another version beside the live one, proves it, switches, drains and starts a new spare.
A watcher that only sleeps shows how long the machine itself stood still.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEAR = 0.5
"""Seconds around a swap's load and switch in which a slow request is counted as the swap's."""


class Watcher(threading.Thread):
    """Sleeps 2 ms at a time; `worst` is by how much a sleep was ever longer, seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.worst = 0.0

    def run(self) -> None:
        while True:
            began = time.perf_counter()
            time.sleep(0.002)
            self.worst = max(self.worst, time.perf_counter() - began - 0.002)


def start_load(url: str, body: Path, rate: float, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "http_load.py"), url, "/v2/models/mlp/infer", "--body", str(body)]
    command += ["--rate", str(rate), "--seconds", str(seconds)]
    command += ["--latencies", str(body.with_name("latencies.json"))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(load: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = load.communicate()
    measured: dict[str, Any] = json.loads(out)
    return measured


def swap_under_load(
    data: Path, swaps: int, rate: float, seconds: float
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(steady, swapping, the swaps' times)."""
    host = subprocess.Popen(
        [sys.executable, str(HERE / "mlp_host.py"), "--data", str(data), "--swaps", str(swaps)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert host.stdin is not None
    assert host.stdout is not None
    url = json.loads(host.stdout.readline())["url"]
    body = data / "body.json"
    watcher = Watcher()
    watcher.start()
    steady = result(start_load(url, body, rate, seconds))
    steady["watcher"], watcher.worst = watcher.worst, 0.0
    load = start_load(url, body, rate, 3600)
    host.stdin.write("g")
    host.stdin.flush()
    try:
        events = [json.loads(host.stdout.readline()) for _ in range(swaps)]
    finally:
        load.send_signal(2)
    swapping = result(load)
    swapping["watcher"] = watcher.worst
    swapping["latencies"] = json.loads((data / "latencies.json").read_text())
    host.communicate()
    return steady, swapping, events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=100, help="requests/s")
    parser.add_argument("--steady", type=float, default=60, help="length of the run without swaps, seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "mlp_host.py"), "--data", folder, "--build"], check=True)
        steady, swapping, events = swap_under_load(Path(folder), options.swaps, options.rate, options.steady)
    loading = sorted(event["live"] - event["loading"] for event in events)
    print(f"{options.swaps} swaps at {options.rate:g} requests/s, open loop, latency from the time due\n")
    print("| | requests | failed | p50 ms | p99 ms | p99.9 ms | worst ms |\n|---|---|---|---|---|---|---|")
    for name, seen in (("steady", steady), ("swapping", swapping)):
        latencies = " | ".join(f"{seen[field]:.2f}" for field in ("p50", "p99", "p99.9", "p100"))
        print(f"| {name} | {seen['requests']} | {seen['failures']} | {latencies} |")
    print(f"\nload beside, prove, switch: median {loading[len(loading) // 2]:.2f} s, longest {loading[-1]:.2f} s")
    print(f"worst request over the steady p99: {swapping['p100'] - steady['p99']:.1f} ms")
    print(f"worst request over the steady worst: {swapping['p100'] - steady['p100']:.1f} ms")
    stood = f"{steady['watcher'] * 1e3:.1f} ms steady, {swapping['watcher'] * 1e3:.1f} ms swapping"
    print(f"the watcher's worst oversleep: {stood}; load average {os.getloadavg()[0]:.1f}")
    for due, latency in sorted(swapping["latencies"], key=lambda pair: -pair[1])[:5]:
        print(f"  {latency * 1e3:.1f} ms, {where(due, events)}")


def where(due: float, events: list[dict[str, Any]]) -> str:
    """What a slow request was near to (perf_counter is one clock for all processes on Linux)."""
    for event in events:
        if event["loading"] <= due <= event["live"] + NEAR:
            return f"swap {event['swap']}, {(due - event['live']) * 1e3:+.0f} ms from its switch"
    return "between swaps"


if __name__ == "__main__":
    main()

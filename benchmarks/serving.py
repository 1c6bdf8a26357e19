"""The agent's front beside other inference servers: the MLP 784-512-512-10 over JSON, keep-alive.

    python benchmarks/serving.py [--peer-python VENV/bin/python] [--seconds 6] [--rounds 3]

Weighbridge runs as the agent runs it: a front, an engine child with one torch thread, a warm spare. With --peer-python,
the interpreter of an environment that has `mlserver` and `torch`, MLServer answers the same request in the same run, in
turns with ours. The other columns were measured in another run on a machine of the same size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ELSEWHERE = {  # requests/s, p50, p95, p99 at 8 connections; p50, p99 at 1; MB loaded
    "Triton 2.51 *": (2818, 2.9, 4.0, 5.0, 0.65, 1.3, 261),
    "MLServer 1.7.1 *": (1010, 7.2, 11, 13, 1.7, 3.6, 319),
    "LitServe 0.2.19 *": (708, 10, 18, 22, 2.9, 4.8, 438),
    "TorchServe 0.12 *": (452, 16, 30, 35, 2.2, 5.0, 561),
    "BentoML 1.4.39 *": (353, 20, 32, 37, 2.6, 4.4, 547),
}


@contextmanager
def weighbridge(folder: Path, batch: int) -> Iterator[dict[str, Any]]:
    """Our host with the MLP live."""
    host = subprocess.Popen(
        [sys.executable, str(HERE / "mlp_host.py"), "--data", str(folder), "--batch", str(batch)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert host.stdout is not None
    try:
        yield {
            "name": f"Weighbridge, batch {batch}" if batch > 1 else "Weighbridge",
            **json.loads(host.stdout.readline()),
        }
    finally:
        host.communicate()


@contextmanager
def mlserver(python: str) -> Iterator[dict[str, Any]]:
    """MLServer with the same network in process, as benchmarks/peer_mlserver.py sets it up."""
    with tempfile.TemporaryDirectory() as folder:
        peer = subprocess.Popen(
            [python, str(HERE / "peer_mlserver.py"), folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert peer.stdout is not None
        try:
            yield {"name": "MLServer, this run", **json.loads(peer.stdout.readline())}
        finally:
            peer.communicate()


def measure(server: dict[str, Any], body: Path, connections: int, seconds: float) -> dict[str, Any]:
    """One run of the load generator, in a process of its own."""
    command = [sys.executable, str(HERE / "http_load.py"), server["url"], "/v2/models/mlp/infer", "--body", str(body)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    if result["failures"]:
        raise SystemExit(f"{server['name']}: {result['failures']} requests failed: {result['first_failures']}")
    return result


def median(results: list[dict[str, Any]], field: str) -> float:
    return statistics.median(result[field] for result in results)


def row(server: dict[str, Any], eight: list[dict[str, Any]], one: list[dict[str, Any]]) -> tuple[float, ...]:
    return (
        *(median(eight, field) for field in ("per_second", "p50", "p95", "p99")),
        median(one, "p50"),
        median(one, "p99"),
        server["memory"]["live"],
    )


def show(name: str, values: tuple[float, ...]) -> None:
    rate, p50, p95, p99, one50, one99, memory = values
    print(f"| {name} | {rate:,.0f} | {p50:.2f} / {p95:.2f} / {p99:.2f} | {one50:.2f} / {one99:.2f} | {memory:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", help="interpreter of an environment with mlserver and torch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        subprocess.run([sys.executable, str(HERE / "mlp_host.py"), "--data", folder, "--build"], check=True)
        with ExitStack() as running:
            servers = [running.enter_context(weighbridge(data, batch)) for batch in (1, 8)]
            if options.peer_python:
                servers.append(running.enter_context(mlserver(options.peer_python)))
            rounds = [  # in turns, so that whatever else the machine does hits all of them
                [
                    [measure(server, data / "body.json", count, options.seconds) for count in (8, 1)]
                    for server in servers
                ]
                for _ in range(options.rounds)
            ]
        rows = [
            (server["name"], row(server, *([turn[number][which] for turn in rounds] for which in (0, 1))))
            for number, server in enumerate(servers)
        ]
    print(f"MLP 784-512-512-10 float32, JSON, one torch thread; median of {options.rounds} x {options.seconds:g} s")
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} processors\n")
    print("| server | requests/s, 8 connections | p50 / p95 / p99 ms | p50 / p99 ms, 1 connection | loaded, MB |")
    print("|---|---|---|---|---|")
    for name, values in [*rows, *ELSEWHERE.items()]:
        show(name, values)
    print("\n* measured in another run on two cores. Ours: proportional set size of the front and the live child.")
    if not options.peer_python:
        print("No peer ran beside it: give --peer-python an interpreter that has mlserver and torch.")


if __name__ == "__main__":
    main()

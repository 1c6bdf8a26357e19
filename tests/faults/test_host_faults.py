"""The host as a process, against a registry on a real socket: it is ended, killed, fenced, and goes on."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest
from fixtures.api import Api, assign, sqlite_only
from fixtures.hosting import put_version
from fixtures.registry import local_token
from fixtures.worker import runs

from weighbridge.hosts.identity import HostFolder
from weighbridge.registry import serve
from weighbridge.registry.client import Client
from weighbridge.registry.db import Database
from weighbridge.registry.notify import LocalNotifier
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.protocols import Ref

pytestmark = [sqlite_only, pytest.mark.slow]

CODE = """
import logging, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
from fixtures.serving import FAKE, FAKE_PROGRAM
from weighbridge.hosts.run import run
from weighbridge.registry.settings import RegistrySettings
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
host = FAKE.model_copy(update={"port": int(sys.argv[4]), "data": Path(sys.argv[3]), "report_seconds": 0.3})
settings = SimpleNamespace(
    registry=RegistrySettings(token=sys.argv[5]), registry_url=sys.argv[2], host_settings=host
)
sys.exit(run(settings, program=FAKE_PROGRAM))
"""


class GatedStore(MemoryStore):
    """Large blobs come up to `stop_at` bytes, then wait for `gate`; the offsets that were asked for are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stop_at, self.gate, self.offsets = 5 << 20, threading.Event(), list[int]()

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        data = self.get(key, start=start, end=end, if_match=if_match)
        if len(data) < self.stop_at:
            return io.BytesIO(data)
        self.offsets.append(start)
        return _Gated(data, self)


class _Gated(io.BytesIO):
    def __init__(self, data: bytes, store: GatedStore) -> None:
        super().__init__(data)
        self._store = store

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self._store.stop_at:
            assert self._store.gate.wait(30)
        return super().read(size)


class Registry:
    """On a loopback port, in threads of this process."""

    def __init__(self, db: Database) -> None:
        self.store, self._stop, ready = GatedStore(), threading.Event(), threading.Event()
        self.api: Any = None
        notifier, blobs = LocalNotifier(), Blobs(self.store, "artifacts")
        urls: list[str] = []

        def tell(url: str) -> None:
            urls.append(url)
            ready.set()

        self._pool = ThreadPoolExecutor(1)
        self.token = local_token(db)
        settings = RegistrySettings(port=0)
        self._pool.submit(serve.serve, settings, db, notifier, blobs, ready=tell, stop=self._stop)
        assert ready.wait(20)
        self.url, self.db, self.notifier, self.blobs = urls[0], db, notifier, blobs
        self.client = Client(self.url, self.token)

    def end(self) -> None:
        self.client.close()
        self.store.gate.set()
        self._stop.set()
        self._pool.shutdown()


@pytest.fixture
def registry(database: Database) -> Iterator[Registry]:
    made = Registry(database)
    yield made
    made.end()


class Process:
    """`weighbridge host` with the fake engine."""

    def __init__(self, registry: Registry, folder: Path, port: int = 0) -> None:
        self.registry, self._folder = registry, folder
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("a") as log:
            arguments = [str(Path(__file__).parents[1]), registry.url, str(folder), str(port), registry.token]
            self.process = subprocess.Popen([sys.executable, "-c", CODE, *arguments], stderr=log)
        self.known = {host.id for host in registry.client.hosts()}

    def token(self) -> str:
        """Its own, once it is enrolled."""
        identity = HostFolder(self._folder).identity()
        assert identity is not None
        assert identity.token is not None
        return identity.token

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def url(self) -> str:
        """Where it serves, once it is enrolled."""
        return until(lambda: next((host.url for host in self.registry.client.hosts() if host.epoch), ""))

    def id(self) -> str:
        return until(lambda: next((host.id for host in self.registry.client.hosts()), ""))


Start = Callable[..., Process]


@pytest.fixture
def start(registry: Registry, tmp_path: Path) -> Iterator[Start]:
    running: list[Process] = []

    def begin(folder: str = "host", **options: Any) -> Process:
        running.append(Process(registry, tmp_path / folder, **options))
        return running[-1]

    yield begin
    for host in running:
        host.process.kill()
        host.process.wait()


def until(condition: Callable[[], Any], seconds: float = 100) -> Any:
    deadline, tick = time.monotonic() + seconds, threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline
        tick.wait(0.02)
    return found


def is_live(registry: Registry, host_id: str, number: int) -> bool:
    for assignment in registry.client.host(host_id).assignments:
        slots = assignment.observed.slots if assignment.observed else []
        return any((slot.version, slot.state) == (number, "live") for slot in slots)
    return False


def serve_version(registry: Registry, host: Process, factor: int, **options: Any) -> int:
    version = put_version(api_of(registry), factor, **options)
    assign(api_of(registry), host.id(), version)
    return version.number


def api_of(registry: Registry) -> Api:
    """What the fixtures need of a registry: its database, notifier and blobs."""
    return Api(None, registry.db, registry.notifier, registry.blobs, None)  # type: ignore[arg-type]


def infer(url: str, x: float) -> httpx.Response:
    body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [x]}]}
    return httpx.post(f"{url}/v2/models/scale/infer", json=body)


def test_sigterm_answers_what_is_in_flight_and_leaves_nothing(registry: Registry, start: Start) -> None:
    """Status 0 within seconds, a long poll under way or not; every engine child ends."""
    host = start()
    number = serve_version(registry, host, 2)
    until(lambda: is_live(registry, host.id(), number))
    url, children = host.url(), host.children()
    for child in children:
        child.suspend()
    until(lambda: all(child.status() == psutil.STATUS_STOPPED for child in children))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(infer, url, 3)
        until(lambda: "weighbridge_in_flight" in httpx.get(f"{url}/metrics").text and in_flight(url))
        began = time.monotonic()
        host.process.send_signal(signal.SIGTERM)
        for child in children:
            child.resume()
        assert slow.result().json()["outputs"][0]["data"] == [6]
    assert host.process.wait(10) == 0
    assert time.monotonic() - began < 8
    assert not any(runs(child.pid) for child in children)


def in_flight(url: str) -> bool:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return any(line.startswith("weighbridge_in_flight{") and not line.endswith(" 0.0") for line in lines)


def test_children_die_with_an_agent_that_is_killed(registry: Registry, start: Start) -> None:
    """kill -9 of the agent leaves no engine child; started again it serves the same."""
    host = start()
    number = serve_version(registry, host, 2)
    until(lambda: is_live(registry, host.id(), number))
    children = host.children()
    assert len(children) >= 1
    host.process.kill()
    host.process.wait()
    until(lambda: not any(runs(child.pid) for child in children))
    again = start()
    epoch = 2
    until(lambda: registry.client.host(again.id()).epoch == epoch)
    until(lambda: infer(again.url(), 3).status_code == 200)


def test_a_pull_goes_on_where_a_killed_agent_stopped(registry: Registry, start: Start) -> None:
    """What came before the kill is hashed again but not fetched again."""
    host = start()
    number = serve_version(registry, host, 2, weights=os.urandom(6 << 20))
    until(lambda: registry.store.offsets)
    partial = Path(host.log.parent / "host" / "blobs" / "partial")
    until(lambda: max((file.stat().st_size for file in partial.glob("*")), default=0) >= 2 << 20)
    host.process.kill()
    host.process.wait()
    registry.store.gate.set()
    again = start()
    until(lambda: is_live(registry, again.id(), number))
    first, *rest = registry.store.offsets
    assert first == 0
    assert all(offset >= 2 << 20 for offset in rest)


def test_one_folder_one_process_and_the_newest_process_of_a_host(registry: Registry, start: Start) -> None:
    """A second agent on the folder ends with 1 and says so; so does one whose copy enrolled elsewhere."""
    host = start()
    host_id = host.id()
    second = start()
    assert second.process.wait(20) == 1
    assert "another host agent runs here" in second.log.read_text()
    from weighbridge.registry.schemas import Enrolment

    with Client(registry.url, host.token()) as copy:
        copy.enrol(Enrolment(id=host_id, name="copy"))
    assert host.process.wait(20) == 1
    assert "must end" in host.log.read_text()


def test_a_port_that_is_taken_is_named(registry: Registry, start: Start) -> None:
    """Status 1, with the setting that helps."""
    host = start()
    port = int(host.url().rpartition(":")[2])
    other = start("other", port=port)
    assert other.process.wait(20) == 1
    assert f"port {port}" in other.log.read_text()
    assert "host.port" in other.log.read_text()

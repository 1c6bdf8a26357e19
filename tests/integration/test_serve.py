"""The registry's server process: starts when it can, tells where, ends at once, outlives its database's absence."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures.postgres import PostgresServer
from fixtures.served import Served
from pydantic import SecretStr

from weighbridge.registry import serve
from weighbridge.registry.client import Client
from weighbridge.registry.errors import Conflict, Forbidden, Invalid, Unavailable
from weighbridge.registry.schemas import Enrolment
from weighbridge.registry.settings import RegistrySettings

SECRET = "s" * 40


class Server(Served):
    """On a free port, with an administrator's token."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, RegistrySettings(**{"port": 0, "token": SecretStr(SECRET), **settings}))

    def client(self) -> Client:
        """Of an administrator."""
        return Client(self.url, SECRET)


@contextmanager
def serving(url: str, **settings: Any) -> Iterator[Server]:
    server = Server(url, **settings)
    try:
        yield server
    finally:
        server.end()
    server.ended.result(0)


def test_it_serves_and_ends_at_once(database_url: str) -> None:
    """It tells its free port; a long poll under way is answered, not cut, when it ends."""
    with serving(database_url) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        host = client.enrol(Enrolment(name="h"))
        waiting = pool.submit(client.desired, host.id, 0, 50)
        # A shorter one that began later is over: the longer one waits.
        assert client.desired(host.id, 0, 0.2).models == []
        server.stop.set()
        server.ended.result(5)
        assert waiting.result(5).revision == 0
    with Client(server.url) as client, pytest.raises(Unavailable, match="no answer"):
        client.start_rollout("digits")


def test_large_blobs_stream(sqlite_url: str, tmp_path: Path) -> None:
    """Over a real connection, from an offset, and stopped early without harm."""
    content = os.urandom(8 << 20)
    with serving(sqlite_url) as server, server.client() as client:
        digest = server.blobs.put_bytes(content).digest
        assert client.blob(digest) == content
        assert b"".join(client.stream_blob(digest, 5 << 20)) == content[5 << 20 :]
        stream = client.stream_blob(digest)
        assert next(stream)
        stream.close()  # type: ignore[attr-defined]
        path = tmp_path / "program.pt2"
        path.write_bytes(content)
        assert client.add_template("t", path, fingerprint="f", parameters={}, inputs=[], outputs=[]).digest == digest


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_wants_an_admin_token(sqlite_url: str, host: str) -> None:
    """Where nobody could call it does not start, and says what to do; a chosen secret lets in; a short one does not."""
    with pytest.raises(Forbidden, match="nobody could call"), serving(sqlite_url, host=host, token=None) as server:
        server.ended.result(20)
    with pytest.raises(Invalid, match="at least 32"), serving(sqlite_url, host=host, token="short") as server:
        server.ended.result(20)
    with serving(sqlite_url, host=host) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/status").status_code == 401
        with Client(url, SECRET) as client:
            assert [token.role for token in client.tokens()] == ["admin"]
    with serving(sqlite_url, host=host, token=None) as server:  # Now there is one.
        assert server.url


def test_a_port_in_use_is_named(sqlite_url: str) -> None:
    """Before anything else happens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = Server(sqlite_url, port=port)
        try:
            with pytest.raises(serve.CannotListen, match=f"127.0.0.1:{port}"):
                server.ended.result(10)
        finally:
            server.end()


def test_it_waits_for_its_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A database that is down at start: said once, tried again, served when it is there."""
    folder = tmp_path / "later"
    said = threading.Event()

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "trying again" in record.getMessage():
                said.set()

    handler = Said()
    serve.logger.addHandler(handler)
    try:
        with serving(f"sqlite:///{folder / 'registry.db'}") as server:
            assert said.wait(10)
            folder.mkdir()
            with server.client() as client:
                assert client.status().models == 0
        said.clear()
        with serving(f"sqlite:///{tmp_path / 'never' / 'registry.db'}"):
            assert said.wait(10)
    finally:
        serve.logger.removeHandler(handler)


def test_it_outlives_its_databases_absence(postgres: PostgresServer, postgres_url: str) -> None:
    """While the database is away: 503 with advice, and not ready; when it is back everything goes on by itself."""
    name = postgres_url.rpartition("/")[2].partition("?")[0]
    with serving(postgres_url) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        host = client.enrol(Enrolment(name="h"))
        waiting = pool.submit(client.desired, host.id, 0, 50)
        postgres.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        answer = httpx.get(f"{server.url}/v1/status", headers={"authorization": f"Bearer {SECRET}"})
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "check that the server runs" in answer.json()["detail"]
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        postgres.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert client.host(host.id).name == "h"
        client.retire(host.id)
        with pytest.raises(Conflict, match="retired"):
            waiting.result(10)


@pytest.mark.slow
def test_as_a_process_it_ends_with_success(tmp_path: Path) -> None:
    """SIGTERM ends `run` with status 0, and it has said where it answers."""
    code = f"""
import logging, sys
from pathlib import Path
from types import SimpleNamespace
from pydantic import SecretStr
from weighbridge.registry.serve import run
from weighbridge.registry.settings import BrokerSettings, RegistrySettings
from weighbridge.storage.settings import StorageSettings
needs = SimpleNamespace(
    data=Path({str(tmp_path / "data")!r}),
    registry=RegistrySettings(port=0), storage=StorageSettings(url={str(tmp_path / "drops")!r}),
    broker=BrokerSettings(url=SecretStr("memory://")), policies=(),
    database_url=SecretStr("sqlite:///" + {str(tmp_path / "r.db")!r}),
)
sys.exit(run(needs, ready=lambda url: print(url, flush=True)))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            assert httpx.get(f"{url}/readyz").status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0

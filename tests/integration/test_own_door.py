"""A registry as a process's own user and as another user of the machine see it: tokens, sockets, files, ports."""

from __future__ import annotations

import http.client
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fixtures.served import Served
from pydantic import SecretStr

from weighbridge import Client
from weighbridge.registry import local
from weighbridge.registry.errors import Unavailable
from weighbridge.registry.schemas import StoreAddress
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage import private
from weighbridge.storage.private import NotPrivate

NOBODY = 65534


def as_nobody(tries: Callable[[], list[object]]) -> list[str]:
    """What another user of the machine gets: a fork that became `nobody`, told through a pipe."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writing, " ".join(map(str, tries())).encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        said = answer.read().split()
    os.waitpid(child, 0)
    return said


def refusal(act: Callable[[], object]) -> str:
    """The name of the error, or what it gave."""
    try:
        return str(act())
    except OSError as error:
        return type(error).__name__


def call(url: str, method: str, path: str, body: bytes) -> int:
    """A request without a token; the status."""
    one = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    one.request(method, path, body, {"content-type": "application/json"})
    return one.getresponse().status


class Running(Served):
    """A registry with a data folder."""

    def __init__(self, url: str, data: Path, path: Path, port: int = 0, token: str | None = None) -> None:
        self.data, self.path = data, path
        settings = RegistrySettings(port=port, socket=path, token=SecretStr(token) if token else None)
        super().__init__(url, settings, address=StoreAddress(url="s3://checkpoints"), data=private.make_folder(data))

    def end(self) -> None:
        super().end()
        self.ended.result(0)


@pytest.fixture
def running(sqlite_url: str, tmp_path: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("WEIGHBRIDGE_URL", "WEIGHBRIDGE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as site:
        os.chmod(site, 0o755)
        one = Running(sqlite_url, Path(site) / local.DATA, socket_folder / "r.sock")
        assert one.url
        yield one
        one.end()


def test_its_own_user_needs_nothing(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the address alone, by another name of it, in its folder without any argument, and by the data folder."""
    (running.data.parent / "deep").mkdir()
    monkeypatch.chdir(running.data.parent / "deep")
    for arguments in ((running.url,), (running.url.replace("127.0.0.1", "localhost"),), ()):
        with Client(*arguments) as client:
            assert client.status().models == 0
            assert client.store().url == "s3://checkpoints"
    with Client(data=running.data) as client:
        assert [(token.role, token.revoked_at) for token in client.tokens()] == [("admin", None)]
        assert httpx.get(client.browser_address(), follow_redirects=True).status_code == 200
    assert httpx.get(f"{running.url}/v1/status").status_code == 401


def test_a_token_that_is_given_is_the_one_that_is_sent(running: Running) -> None:
    """The one that was found lends its rights to nobody who brought less."""
    with Client(data=running.data) as admin:
        viewer = admin.create_token("viewer")
    for client in (Client(running.url, viewer), Client(data=running.data, token=viewer)):
        with client, pytest.raises(PermissionError, match="viewer token"):
            list(client.tokens())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else: run the tests as root")
def test_another_user_of_the_machine_gets_nothing(running: Running) -> None:
    """Without a token 401 for a blob, a template, an admin's token; files and socket do not open, none is planted."""
    url, data = running.url, running.data

    def tries() -> list[object]:
        return [
            call(url, "PUT", f"/v1/blobs/{'0' * 64}", b"evil"),
            call(url, "POST", "/v1/templates", b"{}"),
            call(url, "POST", "/v1/tokens", b'{"role": "admin"}'),
            refusal(lambda: local.token_file(data).read_text()),
            refusal(lambda: (data / "registry.json").read_text()),
            refusal(lambda: (data / "new").write_text("mine")),
            refusal(lambda: socket.socket(socket.AF_UNIX).connect(str(running.path))),
        ]

    assert as_nobody(tries) == ["401"] * 3 + ["PermissionError"] * 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else: run the tests as root")
def test_a_data_folder_that_another_user_planted_is_not_entered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that both can write to: his registry is not the one that is meant, and a command tells it nothing."""
    shared = running.data.parent / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.chdir(shared)

    def plant() -> list[object]:
        planted = shared / local.DATA
        local.announce(local.Local(private.make_folder(planted), ("http://127.0.0.1:9",), planted / "s"))
        private.write(local.token_file(planted), b"wb_his")
        return [local.of(planted) is not None]

    assert as_nobody(plant) == ["True"]
    assert local.around(shared) == local.of(running.data)
    with pytest.raises(NotPrivate):
        private.make_folder(shared / local.DATA)


def test_a_second_registry_of_a_data_folder_leaves_the_first_alone(running: Running, sqlite_url: str) -> None:
    """Its socket, its token and its word stay; the second serves whoever brings a token."""
    before = local.of(running.data), local.read_token(running.data)
    second = Running(sqlite_url, running.data, running.path)
    try:
        assert (local.of(running.data), local.read_token(running.data)) == before
        with Client(second.url, before[1]) as client:
            assert client.status().models == 0
    finally:
        second.end()
    with Client(data=running.data) as client:
        assert client.status().models == 0


def test_a_client_outlives_restarts(sqlite_url: str, tmp_path: Path, socket_folder: Path, running: Running) -> None:
    """Elsewhere, with another token: the same client finds it, by its folder; while it is away it says so."""
    with Client(data=running.data) as client:
        assert client.status().models == 0
        running.end()
        with pytest.raises(Unavailable, match="does not run"):
            client.status()
        again = Running(sqlite_url, running.data, running.path, token="o" * 40)
        try:
            assert again.url
            assert client.status().models == 0  # the token of before has ended
        finally:
            again.end()

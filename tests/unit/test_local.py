"""The registries of this user on this machine: who finds which, and what nobody is sent."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr

from weighbridge import Client
from weighbridge.registry import local
from weighbridge.registry.errors import NotFound, Unauthorized, Unavailable
from weighbridge.registry.local import Local
from weighbridge.registry.schemas import StoreAddress
from weighbridge.registry.serve import store_address
from weighbridge.storage import private
from weighbridge.storage.options import S3Options
from weighbridge.storage.private import NotPrivate
from weighbridge.storage.settings import StorageSettings

TOKEN = "wb_" + "s" * 43
OK = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose index is empty, in a folder without a registry."""
    for name in os.environ:
        if name.startswith("WEIGHBRIDGE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "state"


def leave(data: Path, url: str, path: Path) -> Local:
    """What a registry at `url` leaves in a data folder, and in the index."""
    private.make_folder(data)
    private.write(local.token_file(data), TOKEN.encode())
    left = Local(data, (url, *local.loopback_urls(url, "127.0.0.1")), path)
    local.announce(left)
    return left


class Squatter:
    """Whoever listens on a port, or on a socket: answers 401 to all, and keeps what it was sent."""

    def __init__(self, ear: socket.socket) -> None:
        ear.listen()
        self.heard, self._ear, self._pool = b"", ear, ThreadPoolExecutor(1)
        self._pool.submit(self._listen)

    def _listen(self) -> None:
        while True:
            try:
                caller, _ = self._ear.accept()
            except OSError:
                return
            with caller:
                caller.settimeout(5)
                self.heard += caller.recv(65536)
                caller.sendall(OK)

    def close(self) -> None:
        self._ear.shutdown(socket.SHUT_RDWR)
        self._ear.close()
        self._pool.shutdown()


@pytest.fixture
def squatter() -> Iterator[Squatter]:
    """On a port."""
    listening = Squatter(socket.create_server(("127.0.0.1", 0)))
    yield listening
    listening.close()


def port(one: Squatter) -> int:
    return int(one._ear.getsockname()[1])


def test_who_takes_the_port_is_sent_no_token(squatter: Squatter, socket_folder: Path, tmp_path: Path) -> None:
    """A registry was killed, its entry is left, somebody else listens at its address: it gets not even a request."""
    url = f"http://127.0.0.1:{port(squatter)}"
    leave(tmp_path / "data", url, socket_folder / "gone.sock")
    with Client(url) as client, pytest.raises(Unavailable, match="does not run"):
        client.status()
    with Client(url.replace("127.0.0.1", "localhost")) as client, pytest.raises(Unavailable):
        client.status()
    assert squatter.heard == b""


def test_a_registry_that_ended_is_forgotten(squatter: Squatter, socket_folder: Path, tmp_path: Path) -> None:
    """Then the address is like any other: it is asked, without a token."""
    url = f"http://127.0.0.1:{port(squatter)}"
    local.withdraw(leave(tmp_path / "data", url, socket_folder / "gone.sock"))
    with Client(url) as client, pytest.raises(Unauthorized):
        client.status()
    assert b"GET /v1/status" in squatter.heard
    assert b"authorization" not in squatter.heard.lower()


def test_a_client_that_lived_on_sends_no_token_either(squatter: Squatter, socket_folder: Path, tmp_path: Path) -> None:
    """It was served by the socket; the registry ended, and somebody else has its port when it calls again."""
    url = f"http://127.0.0.1:{port(squatter)}"
    with socket.socket(socket.AF_UNIX) as ear:
        ear.bind(str(socket_folder / "own.sock"))
        os.chmod(socket_folder / "own.sock", 0o600)
        own = Squatter(ear)
        left = leave(tmp_path / "data", url, socket_folder / "own.sock")
        with Client(url) as client:
            with pytest.raises(Unauthorized):
                client.status()
            assert TOKEN.encode() in own.heard
            own.close()
            (socket_folder / "own.sock").unlink()
            with pytest.raises(Unavailable):
                client.status()
            local.withdraw(left)
            with pytest.raises(Unauthorized):
                client.status()
    assert TOKEN.encode() not in squatter.heard


def test_an_entry_of_another_registry_is_not_used(socket_folder: Path, tmp_path: Path) -> None:
    """The index says where to look; the data folder itself says at which addresses its registry answers."""
    left = leave(tmp_path / "data", "http://127.0.0.1:8400", socket_folder / "s.sock")
    assert local.find("http://127.0.0.1:8400/") == left
    assert local.find("http://localhost:8400") == left
    for other in ("http://127.0.0.1:8401", "http://10.0.0.1:8400", "http://[::1]:8400"):
        assert local.find(other) is None
    local.announce(Local(left.data, ("http://127.0.0.1:8401",), left.socket))
    assert local.find("http://127.0.0.1:8400") is None


def test_what_another_user_could_have_put_there_is_not_believed(socket_folder: Path, tmp_path: Path) -> None:
    """A data folder that others can write to, state in a file that others can write to, a socket in an open folder."""
    data = leave(tmp_path / "work" / local.DATA, "http://127.0.0.1:9", socket_folder / "s.sock").data
    assert local.around(tmp_path / "work") is not None
    data.chmod(0o777)
    assert local.around(tmp_path / "work") is None
    with pytest.raises(NotPrivate):
        local.of(data)
    data.chmod(0o700)
    (data / "registry.json").chmod(0o666)
    assert local.around(tmp_path / "work") is None
    (data / "registry.json").chmod(0o600)
    with socket.socket(socket.AF_UNIX) as ear:
        ear.bind(str(socket_folder / "s.sock"))
        planted = Squatter(ear)
        socket_folder.chmod(0o777)
        with Client() as client, pytest.raises(Unavailable):
            client.status()
        socket_folder.chmod(0o700)
        planted.close()
        assert planted.heard == b""


def test_the_nearest_data_folder_counts(socket_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself, the one in it, those above; `Client()` asks the same, and what it is told comes first."""
    outer = leave(tmp_path / local.DATA, "http://127.0.0.1:1", socket_folder / "1")
    inner = leave(tmp_path / "work" / local.DATA, "http://127.0.0.1:2", socket_folder / "2")
    deep = tmp_path / "work" / "a" / "b"
    deep.mkdir(parents=True)
    assert local.around(deep) == local.around(inner.data) == inner
    assert local.around(tmp_path) == local.around(tmp_path / "state") == outer
    for client in (Client(), Client(data=inner.data)):
        assert client.url == inner.url
        client.close()
    monkeypatch.setenv("WEIGHBRIDGE_URL", "http://127.0.0.1:3")
    for client, url in ((Client(), "http://127.0.0.1:3"), (Client(data=outer.data), outer.url)):
        assert client.url == url
        client.close()
    with pytest.raises(NotFound, match="data folder"):
        Client(data=deep)


def test_everything_left_is_private(socket_folder: Path, tmp_path: Path, state: Path) -> None:
    """0600 in 0700, also in a folder that was open before, whatever the umask."""
    (tmp_path / "data").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        leave(tmp_path / "data", "http://127.0.0.1:8400", socket_folder / "s")
    finally:
        os.umask(before)
    for folder in (tmp_path / "data", state / "weighbridge" / "registries"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for file in folder.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert TOKEN not in file.read_text() or file == local.token_file(folder)


def test_a_damaged_state_is_none(socket_folder: Path, tmp_path: Path) -> None:
    """It is written anew at the next start."""
    data = leave(tmp_path / "data", "http://127.0.0.1:8400", socket_folder / "s").data
    for text in ("", "[]", "{", json.dumps({"urls": 1, "socket": 2})):
        private.write(data / "registry.json", text.encode())
        assert local.of(data) is None
        assert local.find("http://127.0.0.1:8400") is None


def test_a_user_without_a_home(tmp_path: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has no index: the data folder still tells."""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/dev/null")
    left = leave(tmp_path / "data", "http://127.0.0.1:8400", socket_folder / "s")
    assert local.find("http://127.0.0.1:8400") is None
    assert local.of(tmp_path / "data") == left
    local.withdraw(left)


def test_publishers_are_told_where_the_store_is(tmp_path: Path) -> None:
    """Its address, without anything that it is opened with."""
    keys = {"access_key": SecretStr("AKIA"), "secret_key": SecretStr("hunter2")}
    s3 = S3Options.model_validate({"endpoint_url": "http://me:hunter2@127.0.0.1:9000", **keys})
    told = store_address(StorageSettings(url="s3://checkpoints", prefix="runs", s3=s3))
    assert told == StoreAddress(url="s3://checkpoints", prefix="runs", endpoint_url="http://127.0.0.1:9000")
    assert "hunter2" not in told.model_dump_json()
    assert store_address(StorageSettings(url="drops")).url == str(tmp_path / "work" / "drops")

"""The doctor: what is well, what is wrong, and what to do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from weighbridge.cli import doctor, main
from weighbridge.cli.doctor import roles, services, store
from weighbridge.cli.doctor.roles import Place, Role
from weighbridge.cli.exits import Exit
from weighbridge.cli.session import Session
from weighbridge.registry.schemas import Host
from weighbridge.storage import errors, lease
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.protocols import PassedOver


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("WEIGHBRIDGE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def findings(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> list[dict[str, Any]]:
    """The doctor's answer."""
    assert main([*arguments, "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == Exit.OK)
    found: list[dict[str, Any]] = answer["findings"]
    return found


def test_a_healthy_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lists, reads, writes once and only once, has space, and leaves nothing behind."""
    (tmp_path / "drops/digits").mkdir(parents=True)
    (tmp_path / "drops/readme").write_text("hello")
    found = findings(capsys, "doctor", "--only", "storage", code=Exit.OK)
    said = " ".join(one["what"] for one in found)
    assert "folders of models: 1" in said
    assert "readme can be read" in said
    assert "is refused when the key is there" in said
    assert list((tmp_path / "drops").rglob("doctor*")) == []


class _Hosts:
    """A run whose registry knows these hosts."""

    def __init__(self, *hosts: Host) -> None:
        self._hosts = hosts

    @contextmanager
    def client(self) -> Iterator[Any]:
        yield self

    def hosts(self) -> tuple[Host, ...]:
        return self._hosts


@pytest.mark.parametrize(
    ("state", "silent", "seconds", "ok", "says"),
    [
        ("enrolled", False, 50.0, True, "gpu-7 is enrolled"),
        ("enrolled", True, 20.0, False, "gpu-7 is silent for 20 s"),
        ("enrolled", True, None, False, "gpu-7 was never heard of"),
        ("retired", False, 9000.0, True, "gpu-7 is retired"),
    ],
)
def test_the_registry_says_which_hosts_are_silent(
    state: str, silent: bool, seconds: float | None, ok: bool, says: str
) -> None:
    """By its own setting, as `hosts` and `status` show it, and with the command that takes one out."""
    host = Host(
        id="7",
        name="gpu-7",
        url="",
        state=state,
        epoch=1,
        silent=silent,
        silent_seconds=seconds,
        created_at=datetime.now(UTC),
    )
    (found,) = services.hosts(_Hosts(host))  # type: ignore[arg-type]
    assert (found.ok, found.what) == (ok, says)
    assert ("weighbridge retire gpu-7" in found.fix) is not ok


def test_a_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names it, the advice says what to do."""
    (found,) = findings(capsys, "doctor", "--only", "storage", code=Exit.FAILED)
    assert "drops" in found["what"]
    assert found["fix"] == "create the bucket or folder, or correct storage.url"


def test_a_store_without_conditional_writes() -> None:
    """It would let two writers overwrite each other's artifacts: that is said, not discovered later."""

    class Careless(MemoryStore):
        def put(self, key: str, data: Any, *, if_none_match: bool = False) -> Any:
            return super().put(key, data)

    found = store.tried(Careless("careless"), ".weighbridge/", Place.ARTIFACTS, set(Role), roles.SERVICES)
    [wrong] = [one for one in found if not one.ok]
    assert "overwrote" in wrong.what
    assert "conditional writes" in wrong.fix
    assert wrong.roles == ("worker", "registry")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errors.AccessDenied("s3://b: refused"), "check storage.s3.access_key"),
        (errors.BucketNotFound("s3://b: no such bucket"), "create the bucket"),
        (errors.StorageFull("s3://b: no space"), "free space"),
        (errors.StorageUnavailable("s3://b: no answer"), "check storage.s3.endpoint_url"),
    ],
)
def test_what_a_store_refuses_comes_with_advice(error: Exception, advice: str) -> None:
    """Wrong keys, a missing bucket, a full disk, a server that is away."""

    def check(_: Session) -> Iterator[Any]:
        raise error
        yield

    (found,) = doctor.examine("storage", check, Session())
    assert not found.ok
    assert found.what == str(error)
    assert advice in found.fix


class Forbidding(FolderStore):
    """A folder whose owner is somebody else (root, as whom these tests may run, is refused nothing)."""

    def put(self, key: str, data: Any, *, if_none_match: bool = False) -> Any:
        raise errors.AccessDenied(f"{self.root}: {key}: Permission denied", key=key)


def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    """Services need not write where publishers do; whoever asks as a publisher is told the right, user and folder."""
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/a.safetensors").write_bytes(b"1234")
    folder = Forbidding(tmp_path)
    daemon = list(store.tried(folder, "", Place.WATCHED, {Role.DAEMON}, {Role.DAEMON}))
    assert all(one.ok for one in daemon)
    assert not any("write" in one.what for one in daemon)
    everybody = list(store.tried(folder, "", Place.WATCHED, set(Role), roles.SERVICES))
    assert all(one.ok for one in everybody)
    [told] = [one for one in everybody if one.roles]
    assert (told.roles, "cannot write an object" in told.what) == (("publish",), True)
    [wrong] = [one for one in store.tried(folder, "", Place.WATCHED, {Role.PUBLISH}, {Role.PUBLISH}) if not one.ok]
    assert f"let user {os.geteuid()} write and search (-wx) in {tmp_path}" in wrong.fix
    assert "`push` and `publish`" in wrong.fix


def test_a_part_that_cannot_be_listed_is_named_and_keeps_nothing_from_being_tried() -> None:
    """A folder of somebody else in the watched one is found, beside what is well."""

    class Partly(MemoryStore):
        def survey(self, prefix: str = "") -> Iterator[Any]:
            refused = errors.AccessDenied("lost+found: Permission denied", key="lost+found/")
            yield PassedOver("lost+found/", "Permission denied", refused)
            yield from self.list(prefix)

    partly = Partly()
    partly.put("digits/a.safetensors", b"1234")
    found = list(store.tried(partly, "", Place.WATCHED, {Role.DAEMON}, {Role.DAEMON}))
    [wrong] = [one for one in found if not one.ok]
    assert "cannot list objects: lost+found" in wrong.what
    assert any("digits/a.safetensors can be read" in one.what for one in found if one.ok)


def test_a_file_system_whose_writers_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, with what is done instead; nothing is wrong."""
    monkeypatch.setattr(lease, "_kind", lambda descriptor: 0x6969)
    (tmp_path / "a").write_bytes(b"1234")
    found = list(store.tried(FolderStore(tmp_path), "", Place.WATCHED, {Role.DAEMON}, {Role.DAEMON}))
    assert all(one.ok for one in found)
    [told] = [one for one in found if one.roles]
    assert "cannot see who has a file open for writing" in told.what
    assert "quiet for a while" in told.fix


def test_a_role_that_is_none_is_wrong_usage() -> None:
    """It says which there are."""
    assert main(["doctor", "--role", "boss"]) == Exit.USAGE


def test_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before a checkpoint does not fit."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    (found,) = store.space(tmp_path / "not/yet/there", MemoryStore("space"))
    assert not found.ok
    assert "free some space" in found.fix


def test_a_broker_and_a_database_that_are_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens on the discard port, nobody made the schema: both are named, no password is."""
    secret = "redis://:hunter2@127.0.0.1:9/0"
    flags = ["--set", f"broker.url={secret}", "--set", f"data={tmp_path}", "doctor", "--only", "broker"]
    broker, database = findings(capsys, *flags, "--only", "database", code=Exit.FAILED)
    assert "does not answer" in broker["what"]
    assert "hunter2" not in broker["what"]
    assert "its schema is at revision none" in database["what"]


def test_an_unknown_part_is_wrong_usage() -> None:
    """It says which there are."""
    assert main(["doctor", "--only", "moon"]) == Exit.USAGE

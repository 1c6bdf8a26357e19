"""The agent by itself: instant rollback, a registry that is away, fences, tokens, children and folders that break."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fixtures.api import Api, assign, sqlite_only
from fixtures.hosting import InThread, Wire, artifact_of, become, give, live, put_version, until
from fixtures.serving import engine_children

from weighbridge.hosts.identity import HostFolder, HostFolderInUse
from weighbridge.hosts.membership import Fenced, Refused
from weighbridge.hosts.router import Slots
from weighbridge.registry import hosts
from weighbridge.registry.schemas import Enrolment
from weighbridge.storage import streaming

pytestmark = sqlite_only
Start = Callable[..., InThread]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts agents: `start(api)`; the same folder unless another is named."""
    running: list[InThread] = []

    def begin(api: Api, folder: str = "host", **changes: Any) -> InThread:
        running.append(InThread(api, tmp_path / folder, **changes))
        return running[-1]

    yield begin
    for host in running:
        host.stop()


def versions(slots: Slots) -> set[str]:
    return {slot.spec.version for slot in slots}


def test_a_rollback_pulls_and_loads_nothing(api: Api, start: Start) -> None:
    """The previous version is still resident; after a third one it is not, and its blobs are gone."""
    first, second, third = (put_version(api, factor) for factor in (1, 2, 3))
    host = start(api)
    live(api, host, first)
    live(api, host, second)
    fetched, pids = list(host.wire.fetched), host.on_loop(pids_by_version)
    live(api, host, first)
    assert host.infer(3) == (first.number, 3)
    assert host.wire.fetched == fetched
    assert host.on_loop(pids_by_version) == pids
    live(api, host, third)
    kept = HostFolder(host.settings.data).blobs
    gone = artifact_of(api, second)
    until(host, lambda: not (kept / gone[:2] / gone).exists())
    assert host.on_loop(versions) == {str(first.number), str(third.number)}


def pids_by_version(slots: Slots) -> dict[str, int]:
    return {slot.spec.version: slot.child.pid for slot in slots if slot.child is not None}


def test_it_starts_while_the_registry_is_away(api: Api, start: Start) -> None:
    """It serves what was wanted last, from its own disk; a host that never knew is not ready."""
    version = put_version(api, 2)
    host = start(api)
    assert not host.ready or host.id
    live(api, host, version)
    host.stop()
    cut = Wire(api)
    cut.cut = True
    again = start(api, wire=cut)
    assert not again.ready
    until(again, lambda: again.ready)
    assert again.infer(3) == (version.number, 6)
    other = start(api, "other", wire=cut)
    assert not other.ready
    cut.cut = False
    become(api, again, version, "live")
    until(other, lambda: other.ready)


def test_a_new_process_fences_the_old_one(api: Api, start: Start, tmp_path: Path) -> None:
    """The old one ends and says why; one folder is one process."""
    old = start(api)
    live(api, old, put_version(api, 1))
    new = start(api)  # the test's agents do not lock their folder: `run` does
    with pytest.raises(Fenced, match="must end"):
        old.ended.result(20)
    until(new, lambda: new.ready)
    with HostFolder(tmp_path).locked(), pytest.raises(HostFolderInUse, match="another host agent"):
        HostFolder(tmp_path).locked().__enter__()


def test_tokens(closed_api: Api, start: Start) -> None:
    """A one-time token becomes the host's own, for its user's eyes; revoked, the host ends; a new one lets it in."""
    api = closed_api
    with pytest.raises(Refused, match="enrolment token"):
        start(api, "uninvited").ended.result(20)
    host = start(api, token=api.token("enrol"))
    until(host, lambda: host.id)
    identity = HostFolder(host.settings.data).identity_file
    assert stat.S_IMODE(identity.stat().st_mode) == 0o600
    host.stop()
    again = start(api)
    until(again, lambda: again.ready)
    admin = api.client(api.token("admin"))
    (own,) = [token for token in admin.tokens() if token.role == "host"]
    admin.revoke_token(own.id, force=True)
    with pytest.raises(Refused, match=f"names host {host.id}"):
        again.ended.result(20)
    invited = start(api, token=api.token("enrol", host.id))
    until(invited, lambda: invited.ready and admin.host(host.id).epoch == 3)  # it is ready before it was let in
    assert invited.id == host.id
    assert [token.revoked_at is None for token in admin.tokens() if token.role == "host"] == [True, False]


def test_a_host_without_a_token_of_its_own_is_let_in_on_its_users_machine(api: Api, start: Start) -> None:
    """It died while it was let in, which used up its one-time token; or it is from before hosts had tokens."""
    used = api.token("enrol")
    api.client(used).enrol(Enrolment(name="died"))
    host = start(api, token=used)
    until(host, lambda: host.id)
    folder = HostFolder(host.settings.data)
    before = folder.identity()
    assert before is not None
    assert before.token is not None
    host.stop()
    folder.keep_identity(before.model_copy(update={"token": None}))
    again = start(api)
    until(again, lambda: (folder.identity() or before).token is not None)
    assert (folder.identity() or before).id == before.id


def test_a_retired_host_ends(api: Api, start: Start) -> None:
    """It does not come back by itself under its old id."""
    host = start(api)
    live(api, host, put_version(api, 1))
    api.client().retire(host.id, force=True)
    with pytest.raises(Refused, match="retired"):
        host.ended.result(20)


def test_a_registry_that_forgot_the_host_learns_of_it_again(api: Api, start: Start) -> None:
    """Another epoch than the registry knows, as after a restored backup: it enrols again and is not fenced."""
    host = start(api)
    version = put_version(api, 1)
    live(api, host, version)
    with api.db.transaction() as tx:
        row = hosts.get(tx, host.id)
        row.epoch -= 1
        tx.add(row)
    reports = host.wire.reports
    until(host, lambda: host.wire.reports > reports + 2)
    assert not host.ended.done()
    assert host.infer(3) == (version.number, 3)


def test_a_killed_child_costs_at_most_the_requests_that_it_held(api: Api, start: Start) -> None:
    """Under load from four clients: those in flight fail, those that come meanwhile wait; it comes back by itself."""
    host = start(api)
    version = put_version(api, 2)
    live(api, host, version)
    done = threading.Event()
    failed: list[str] = []
    answered: list[tuple[int, float]] = []

    def ask() -> None:
        while not done.is_set():
            try:
                answered.append(host.infer(3))
            except LookupError as exc:
                failed.append(str(exc))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        until(host, lambda: len(answered) > 20)
        (pid,) = host.on_loop(pids_by_version).values()
        os.kill(pid, signal.SIGKILL)
        until(host, lambda: host.on_loop(pids_by_version).get(str(version.number), pid) != pid)
        count = len(answered)
        until(host, lambda: len(answered) > count + 20)
        done.set()
        for one in asking:
            one.result()
    assert set(answered) == {(version.number, 6)}
    assert len(failed) <= 4
    become(api, host, version, "live")


def test_a_version_that_is_wanted_while_its_child_comes_back_is_not_loaded_twice(api: Api, start: Start) -> None:
    """It is reported as loading until it is back, and there is one slot of it."""
    host = start(api)
    first, second = put_version(api, 1), put_version(api, 2)
    live(api, host, first)
    live(api, host, second)
    killed = host.on_loop(pids_by_version)[str(first.number)]
    os.kill(killed, signal.SIGKILL)
    until(host, lambda: host.on_loop(pids_by_version).get(str(first.number)) != killed)
    live(api, host, first)
    assert sorted(host.on_loop(lambda slots: [slot.spec.version for slot in slots])) == ["1", "2"]


def test_a_full_disk_is_told_and_goes_by_itself(api: Api, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected: writing a blob fails with ENOSPC. The old version serves on; with space again the new one comes."""
    host = start(api)
    old, new = put_version(api, 1), put_version(api, 2)
    live(api, host, old)
    real = os.fsync

    def full(descriptor: int) -> None:
        if "partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    give(api, host, new)
    told = become(api, host, new, "failed")
    assert "space" in told.reason
    assert host.infer(3) == (old.number, 3)
    monkeypatch.undo()
    become(api, host, new, "live")


def test_a_pull_that_is_overtaken_stops(api: Api, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """News while weights come: their download ends at its next chunk, and what is wanted now is live."""
    host = start(api)
    big, small = put_version(api, 1, weights=os.urandom(8 << 20)), put_version(api, 2)
    began, go_on = threading.Event(), threading.Event()
    pulling: list[threading.Thread] = []
    chunks_seen: list[int] = []
    real = streaming.chunks

    def slow(file: Any, *args: Any) -> Iterator[Any]:
        for chunk in real(file, *args):
            if len(chunk) > 4096:
                pulling.append(threading.current_thread())
                began.set()
                assert go_on.wait(20)
                chunks_seen.append(len(chunk))
            yield chunk

    monkeypatch.setattr("weighbridge.storage.local_cache.chunks", slow)
    give(api, host, big)
    assert began.wait(20)
    assign(api, host.id, small)
    become(api, host, small, "live")
    go_on.set()
    pulling[0].join(20)
    assert len(chunks_seen) == 1
    assert host.infer(3) == (small.number, 6)


def test_nothing_is_left_when_it_ends(api: Api, start: Start) -> None:
    """Live, previous and spare children, half-way through a load too."""
    before = engine_children()
    host = start(api)
    live(api, host, put_version(api, 1))
    give(api, host, put_version(api, 2, "slow"))
    until(host, lambda: len(engine_children() - before) >= 2)
    host.stop()
    assert engine_children() == before


def test_what_it_wrote_and_cannot_read_any_more(api: Api, start: Start, tmp_path: Path) -> None:
    """An unreadable wish is waited for again; an unreadable identity ends the agent and names the file."""
    folder = HostFolder(tmp_path / "host")
    (folder.folder / "desired.json").write_text("{")
    host = start(api)
    until(host, lambda: host.ready)
    host.stop()
    folder.identity_file.write_text("{")
    with pytest.raises(Exception, match=r"identity\.json is not readable"):
        start(api)

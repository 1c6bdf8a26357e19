"""Who is silent and what cannot be reached, by the database's clock, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from fixtures.api import Api, Start, assign, put_ready
from sqlalchemy import update
from sqlmodel import col, select

from weighbridge.cli import fleet as cli
from weighbridge.daemon.loops import Idle
from weighbridge.daemon.reach import Reach
from weighbridge.registry import db
from weighbridge.registry.db import Database
from weighbridge.registry.models import Event, Host, Lease
from weighbridge.registry.notify import LocalNotifier
from weighbridge.registry.schemas import Enrolment, Observed, ObservedModel, ObservedSlot, SilentHost, Status, StoreAway
from weighbridge.storage.errors import AccessDenied, StorageUnavailable
from weighbridge.storage.memory import MemoryStore


class Flaky(MemoryStore):
    """A store that can be away."""

    trouble: Exception | None = None

    def check(self) -> None:
        if self.trouble is not None:
            raise self.trouble


def silent_since(database: Database, host_id: str, seconds: float) -> None:
    """Let the database's clock have gone on since the host's last word."""
    with database.transaction() as tx:
        tx.execute(update(Host).where(col(Host.id) == host_id).values(seen_at=db.clock(tx) - seconds))


def serving(api: Api) -> str:
    """A host that said it serves version 1."""
    version, host = put_ready(api), api.client().enrol(Enrolment(name="gpu-7"))
    slot = assign(api, host.id, version)
    live = ObservedSlot(**slot.model_dump(include={"version", "variant", "artifact"}), state="live", golden="passed")
    report = ObservedModel(model="digits", generation=1, slots=[live])
    api.client(host.token).observed(host.id, Observed(epoch=host.epoch, models=[report]))
    return host.id


def test_a_dead_host_is_not_live(api: Api) -> None:
    """After `registry.silent_seconds`; what it said that it serves is told as what was."""
    host_id = serving(api)
    host = api.client().host(host_id)
    assert (host.silent, cli.state(host), cli.serves(host)) == (False, "enrolled", "digits: 1 live")
    assert api.client().status().silent == []
    silent_since(api.db, host_id, 80)
    (host,) = api.client().hosts()
    assert (host.silent, cli.state(host), cli.serves(host)) == (True, "silent", "digits: 1 was live")
    (silent,) = api.client().status().silent
    assert (silent.name, silent.seconds) == ("gpu-7", pytest.approx(80, abs=60))


def test_how_long_is_silent_is_a_setting(start_api: Start) -> None:
    """And one that never called is silent from the start; one that is retired is none of anybody's."""
    api = start_api(silent_seconds=100.0)
    host_id = serving(api)
    silent_since(api.db, host_id, 80)
    assert not api.client().host(host_id).silent
    with api.db.transaction() as tx:
        tx.execute(update(Host).values(seen_at=None))
    assert api.client().host(host_id).silent
    assert not api.client().retire(host_id).silent
    assert api.client().status().silent == []


def test_a_store_that_is_away_is_told_once_and_shown_until_it_is_back(api: Api) -> None:
    """By whichever daemon speaks: others, and starts, say nothing again."""
    store, notifier = Flaky("bucket"), LocalNotifier()
    one, other = (Reach(store, api.db, notifier, owner) for owner in ("one", "other"))
    assert api.client().status().daemon_silent_seconds is None
    one.once(Idle())
    assert (api.client().status().away, api.client().status().daemon_silent_seconds) == ([], 0)
    store.trouble = StorageUnavailable("connection refused")
    for reach in (one, other, one, Reach(store, api.db, notifier, "one")):
        reach.once(Idle())
    (away,) = api.client().status().away
    assert (away.store, away.reason) == (store.url, "connection refused")
    store.trouble = None
    other.once(Idle())
    assert len(api.client().status().away) == 1  # the one that holds the lease speaks
    one.once(Idle())
    assert api.client().status().away == []
    store.trouble = AccessDenied("the keys may not list")
    one.once(Idle())
    with api.db.read() as tx:
        told = list(tx.scalars(select(Event.kind).where(col(Event.kind).startswith("store.")).order_by(col(Event.id))))
    assert told == ["store.away", "store.back", "store.away"]


def test_a_daemon_that_is_gone_shows(api: Api) -> None:
    """Its lease is over."""
    Reach(MemoryStore("b"), api.db, LocalNotifier(), "one").once(Idle())
    with api.db.transaction() as tx:
        tx.execute(update(Lease).where(col(Lease.name) == "daemon").values(until=db.clock(tx) - 50))
    assert api.client().status().daemon_silent_seconds == pytest.approx(50, abs=40)


def test_status_says_it_in_words() -> None:
    """A line each; nothing where all is well."""
    well = Status(version="", models=1, versions={}, jobs={}, waiting=[], rollouts=[], hosts=2, last_seq=0,
                  daemon_silent_seconds=0)  # fmt: skip
    assert list(cli.troubles(well)) == []
    silent = [SilentHost(id="a", name="gpu-7", seconds=80.2), SilentHost(id="b", name="gpu-8")]
    away = [StoreAway(store="s3://drops", reason="connection refused", since=datetime.now(UTC))]
    ill = well.model_copy(update={"silent": silent, "away": away, "daemon_silent_seconds": None})
    assert list(cli.troubles(ill)) == [
        "silent: 2 hosts: gpu-7 (for 80 s), gpu-8 (never heard)",
        "unreachable: s3://drops, since 0 s ago: connection refused",
        "no daemon has been heard of: nothing that lands is looked at (`weighbridge daemon`)",
    ]
    assert list(cli.troubles(well.model_copy(update={"daemon_silent_seconds": 5.0}))) == [
        "silent: the daemon, for 5 s: nothing that lands is looked at"
    ]

"""The daemon: every loop in one process, from its settings to its clean end."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol
from urllib.parse import urlsplit

from pydantic import SecretStr

from weighbridge.daemon import lanes, systemd
from weighbridge.daemon.dispatch import Dispatch
from weighbridge.daemon.intake import Intake
from weighbridge.daemon.judging import Judging
from weighbridge.daemon.layout import Layout
from weighbridge.daemon.listing import Listing
from weighbridge.daemon.looks import Looks
from weighbridge.daemon.loops import Health, Loop
from weighbridge.daemon.reach import Reach
from weighbridge.daemon.reading import Reading
from weighbridge.daemon.reconcile import Control, Reconcile, Sequencer
from weighbridge.daemon.settings import DaemonSettings
from weighbridge.daemon.watching import Watching
from weighbridge.daemon.webhook import Listener, Notifications
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Unavailable
from weighbridge.registry.notify import Notifier, open_notifier
from weighbridge.registry.recipe import Policy
from weighbridge.registry.settings import BrokerSettings
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.protocols import Store
from weighbridge.storage.settings import MOVE, StorageSettings
from weighbridge.workers.queue import Sender, make_sender
from weighbridge.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005
"""Longest turn of one thread where others wait for theirs. By default it is ten times as long: then a look, which asks
the store and the database some fifty times, waits behind a listing's and other looks' turns for up to a second."""
READ_THREADS = 2
"""Checkpoints that were touched, read at once."""
STOP_SECONDS = 10.0
"""How long the loops may take to finish what they are at."""


class DaemonNeeds(Protocol):
    """The settings that a daemon reads; weighbridge.settings.Settings has them."""

    @property
    def storage(self) -> StorageSettings: ...
    @property
    def broker(self) -> BrokerSettings: ...
    @property
    def daemon(self) -> DaemonSettings: ...
    @property
    def worker(self) -> WorkerSettings: ...
    @property
    def policies(self) -> tuple[Policy, ...]: ...
    @property
    def database_url(self) -> SecretStr: ...


class Daemon:
    """The loops over given parts, which it does not own. `with Daemon(…):` runs them."""

    def __init__(self, needs: DaemonNeeds, *, store: Store, db: Database, notifier: Notifier, sender: Sender) -> None:
        storage, settings, policies = needs.storage, needs.daemon, needs.policies
        owner = f"daemon:{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        layout = Layout.of(storage.prefix, storage.artifacts_below or "")
        if storage.exposed:
            log.warning("%s; %s", storage.exposed, MOVE)
        self._notifier = notifier
        reading = Reading(store, lambda group: self.intake.hint(group), lambda: self._reading.wake())
        self.intake = Intake(
            store,
            layout,
            db,
            notifier,
            Looks(settings.look_seconds, settings.look_max_seconds),
            reading,
            policies=policies,
            settle_seconds=settings.settle_seconds,
            rescan=lambda prefix: self.listing.request(prefix),
            judged=lambda model: self.judging.changed(model),
            wake=lambda: self._looking.wake(),
            processor=time.thread_time,
        )
        self.listing = Listing(
            store,
            layout,
            db,
            self.intake.hint,
            seconds=settings.list_seconds,
            judged=self.intake.changed,
            begun=lambda model: self.judging.changed(model),
            wake=lambda: self._listing.wake(),
            wake_below=lambda: self._rescan.wake(),
        )
        self.judging = Judging(store, db, notifier, policies=policies, wake=lambda: self._judging.wake())
        dispatch = Dispatch(
            db,
            sender,
            in_flight=settings.in_flight,
            resend_seconds=settings.resend_seconds,
            poll_seconds=settings.poll_seconds,
        )
        reconcile = Reconcile(db, notifier, policies=policies, seconds=settings.reconcile_seconds)
        control = Control(
            db,
            notifier,
            owner,
            policies=policies,
            seconds=settings.control_seconds,
            lease_seconds=needs.worker.lease_seconds,
        )
        sequencer = Sequencer(db, notifier, owner, poll_seconds=settings.poll_seconds)
        self._looking, self._listing = Loop(self.intake, threads=lanes.THREADS), Loop(self.listing)
        self._rescan = Loop(self.listing.below)
        self._reading, self._judging = Loop(reading, threads=READ_THREADS), Loop(self.judging)
        self._dispatch, self._sequencer = Loop(dispatch), Loop(sequencer)
        self.loops = [
            self._looking,
            self._reading,
            self._listing,
            self._rescan,
            self._judging,
            self._dispatch,
            self._sequencer,
            Loop(reconcile),
            Loop(control),
            Loop(Reach(store, db, notifier, owner)),
        ]
        self._watching: Watching | None = None
        if isinstance(store, FolderStore) and settings.watch:
            self._watching = Watching(store.root, self.intake.tell)
            self.loops.append(Loop(self._watching))
        self._listener = _listener(needs, self)
        self._bells = contextlib.ExitStack()

    @property
    def webhook_url(self) -> str | None:
        """Where bucket notifications are taken; None: nowhere."""
        return self._listener.url if self._listener else None

    def health(self) -> list[Health]:
        return [loop.health() for loop in self.loops]

    def turning(self, limit: float) -> bool:
        """Whether no loop hangs: each turned, well or badly, or gave a sign of life in the last `limit` seconds."""
        return all(health.late < limit for health in self.health())

    def __enter__(self) -> Daemon:
        self._bells.enter_context(self._notifier.listen("jobs", then=self._dispatch.wake))
        self._bells.enter_context(self._notifier.listen("events", then=self._sequencer.wake))
        if self._listener is not None:
            self._listener.start()
        for loop in self.loops:
            loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the transactions under way and end every thread."""
        if self._listener is not None:
            self._listener.stop()
        self._bells.close()
        for loop in self.loops:
            loop.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for loop in self.loops:
            if not loop.join(deadline):
                log.warning("%s did not end within %g s; what it was at is rolled back", loop.name, STOP_SECONDS)
        if self._watching is not None:
            self._watching.stop()


def run(needs: DaemonNeeds) -> int:
    """Run until SIGTERM or SIGINT; the exit status. What is away at the start is waited for, with a clear message."""
    stop = threading.Event()
    sys.setswitchinterval(_SWITCH_SECONDS)
    with _signals(stop), contextlib.ExitStack() as parts:
        db = Database(needs.database_url)
        parts.callback(db.close)
        sender = make_sender(needs.broker)
        parts.callback(sender.close)
        notifier = open_notifier(needs.broker.url, needs.broker.channel)
        parts.callback(notifier.close)
        store = needs.storage.open_source()
        if not await_ready(db.check, stop):
            return 0
        with Daemon(needs, store=store, db=db, notifier=notifier, sender=sender) as daemon:
            log.info("watching %s, database %s", store.url, db.url_safe)
            _serve(daemon, stop)
        log.info("ended")
    return 0


def await_ready(check: Callable[[], None], stop: threading.Event, *, first: float = 0.2, longest: float = 5.0) -> bool:
    """Try until `check` no longer raises Unavailable, saying each reason once; False when asked to stop meanwhile."""
    said, pause = "", first
    while not stop.is_set():
        try:
            check()
        except Unavailable as error:
            if str(error) != said:
                log.warning("%s; waiting for it", error)
            said = str(error)
            stop.wait(pause)
            pause = min(pause * 1.5, longest)
        else:
            return True
    return False


def _serve(daemon: Daemon, stop: threading.Event) -> None:
    systemd.notify("READY=1")
    period = systemd.watchdog_seconds()
    while not stop.wait(period / 3 if period else 60.0):
        if period and daemon.turning(max(period, 30.0)):
            systemd.notify("WATCHDOG=1")
    systemd.notify("STOPPING=1")


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`."""
    numbers: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _listener(needs: DaemonNeeds, daemon: Daemon) -> Listener | None:
    settings = needs.daemon
    if settings.webhook_port is None:
        return None
    parts = urlsplit(needs.storage.url)
    if parts.scheme != "s3":
        raise ValueError("daemon.webhook_port: only an s3:// store sends bucket notifications; unset it")
    token = settings.webhook_token.get_secret_value() if settings.webhook_token else None
    app = Notifications(daemon.intake.tell, bucket=parts.netloc, prefix=parts.path, token=token, health=daemon.health)
    return Listener(app, settings.webhook_host, settings.webhook_port, token=token)

"""The host agent: enrols, long-polls what this host should hold, holds it, reports. It calls; nobody calls it.

A registry that is away changes nothing here: what serves goes on serving, and a host that starts meanwhile serves what
was wanted last.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from functools import partial
from typing import Any

from weighbridge.engines.hardware import NoSuchDevice, describe
from weighbridge.engines.manifest import Manifest
from weighbridge.hosts.children import ChildProgram
from weighbridge.hosts.daemon_thread import in_daemon_thread
from weighbridge.hosts.holding import Holding
from weighbridge.hosts.identity import HostFolder
from weighbridge.hosts.membership import Membership, OpenClient
from weighbridge.hosts.pull import manifest_of, pull
from weighbridge.hosts.router import Slot, Slots
from weighbridge.hosts.runner import resident_bytes
from weighbridge.hosts.settings import HostSettings
from weighbridge.hosts.swap import Swapper
from weighbridge.registry.client import Client
from weighbridge.registry.schemas import Desired, DesiredModel, Enrolment, Observed
from weighbridge.storage.errors import StorageFull
from weighbridge.storage.local_cache import BlobCache

log = logging.getLogger(__name__)

_SETTLE = 0.005
"""Seconds that news are collected for, so that one switch is one report."""


def device_facts(setting: str) -> dict[str, Any]:
    """What this host serves on, and as what kind the registry chooses variants for it; "" is a kind nobody measured.

    A device that cannot be described is no reason to stay away: loading on it says what is wrong, where it is seen.
    """
    try:
        return {**describe(setting).model_dump(mode="json"), "setting": setting}
    except (NoSuchDevice, OSError) as exc:
        log.warning("cannot describe device %s, so originals are served here: %s", setting, exc)
        return {"kind": "", "device": setting}


class Agent:
    """Everything of a host but its HTTP face. `url`: where that face is; informative."""

    def __init__(
        self,
        folder: HostFolder,
        settings: HostSettings,
        slots: Slots,
        open_client: OpenClient,
        *,
        name: str,
        url: str,
        program: ChildProgram = ChildProgram(),  # noqa: B008  it is frozen
    ) -> None:
        self._folder, self._settings, self._slots = folder, settings, slots
        enrolment = Enrolment(name=name, url=url, labels=settings.labels, device=device_facts(settings.device))
        once = settings.enrolment_token
        self._member = Membership(folder, open_client, enrolment, once.get_secret_value() if once else None)
        self._cache = BlobCache(folder.blobs)
        self._swapper = Swapper(slots, settings, self._on_slot, program)
        self._holdings: dict[str, Holding] = {}
        self._news = asyncio.Event()
        self._numbers = itertools.count(1)
        self._evicting = asyncio.Lock()
        self._pulls = 0
        self._kept: set[str] | None = None
        slots.expected, slots.certain = None, False  # not ready before it is known what to serve

    async def run(self) -> None:
        """Serve until cancelled. Raises Fenced, and Refused when the registry does not let this host in."""
        self._swapper.prepare()
        if self._member.known and (last := self._folder.desired()) is not None:
            self._apply(last, certain=False)
        try:
            await self._member.enrol()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._poll(), name="poll")
                tasks.create_task(self._report(), name="report")
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # either loop ends only by an error, which then ends the other
        finally:
            await asyncio.gather(*(holding.drop() for holding in self._holdings.values()))
            await self._swapper.close()
            self._member.close()

    async def _poll(self) -> None:
        revision = -1
        while True:
            desired = await self._member.call(partial(self._ask, revision))
            if desired.revision != revision:
                revision = desired.revision
                self._apply(desired, certain=True)
                await self._remember(desired)

    def _ask(self, revision: int, client: Client) -> Desired:
        return client.desired(self._member.id, revision, self._settings.poll_seconds)

    async def _remember(self, desired: Desired) -> None:
        try:
            await in_daemon_thread(partial(self._folder.keep_desired, desired))
        except OSError as exc:
            log.warning("cannot keep what this host should serve for its next start: %s", exc)

    def _apply(self, desired: Desired, *, certain: bool) -> None:
        self._slots.assign(frozenset(model.model for model in desired.models if model.slots), certain=certain)
        wanted = {model.model: model for model in desired.models}
        for model in self._holdings.keys() | wanted.keys():
            if model not in self._holdings:
                self._holdings[model] = Holding(
                    model, self._swapper, str(self._folder.blobs), self._pull, self._on_holding
                )
            self._holdings[model].want(wanted.get(model, DesiredModel(model=model, generation=0, slots=[])))
        self._news.set()

    async def _report(self) -> None:
        """Report every change at once, and the counters every `report_seconds`; then let unused blobs go.

        A report is repeated until it arrived, so that no interval is lost; the registry counts each once.
        """
        while True:
            self._news.clear()
            interval_id = str(next(self._numbers))
            models = [holding.observed(interval_id) for holding in self._holdings.values() if holding.wanted]
            memory = {"resident_bytes": float(resident_bytes())}
            await self._member.call(partial(self._say, Observed(epoch=0, models=models, memory=memory)))
            if self._keep() != self._kept:
                await self._evict()
            try:
                await asyncio.wait_for(self._news.wait(), self._settings.report_seconds)
            except TimeoutError:
                continue
            await asyncio.sleep(_SETTLE)

    def _say(self, observed: Observed, client: Client) -> None:
        client.observed(self._member.id, observed.model_copy(update={"epoch": self._member.epoch}))

    async def _pull(self, artifact: str) -> Manifest:
        try:
            return await self._fetch(artifact)
        except StorageFull:
            await self._evict()  # what an abandoned download left may be what fills the disk
            raise

    async def _fetch(self, artifact: str) -> Manifest:
        """Pull in a thread that stops at its next chunk when nobody waits for it any more."""
        async with self._evicting:
            self._pulls += 1
        abandoned = threading.Event()

        def go_on(_: int) -> None:
            if abandoned.is_set():
                raise InterruptedError(f"the pull of {artifact} is not wanted any more")

        try:
            return await in_daemon_thread(partial(pull, self._member.client, self._cache, artifact, progress=go_on))
        finally:
            abandoned.set()
            self._pulls -= 1

    async def _evict(self) -> None:
        """Let go of blobs that are neither wanted nor resident; not during a pull, whose blobs are not known yet."""
        async with self._evicting:
            if self._pulls or self._slots.expected is None:
                return
            keep = self._keep()
            try:
                await in_daemon_thread(partial(self._cache.evict, keep))
            except OSError as exc:
                log.warning("cannot remove unused blobs: %s", exc)
            self._kept = keep

    def _keep(self) -> set[str]:
        manifests = {spec.artifact: spec.manifest for spec in (slot.spec for slot in self._slots)}
        wanted = {slot.artifact for holding in self._holdings.values() for slot in holding.wanted}
        for artifact in wanted - manifests.keys():
            if (manifest := manifest_of(self._cache, artifact)) is not None:
                manifests[artifact] = manifest
        return wanted.union(manifests, *(manifest.blobs() for manifest in manifests.values()))

    def _on_slot(self, slot: Slot) -> None:
        self._news.set()

    def _on_holding(self) -> None:
        for model, holding in self._holdings.items():
            if holding.failed:
                self._slots.give_up(model)
        self._news.set()

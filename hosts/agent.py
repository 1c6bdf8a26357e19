"""The host agent: enrols, long-polls what this host should hold, holds it, reports. It calls; nobody calls it.

A registry that is away changes nothing here: what serves goes on serving, and a host that starts meanwhile serves what
was wanted last.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import tenacity

from weighbridge.engines.manifest import Manifest
from weighbridge.hosts.holding import Holding
from weighbridge.hosts.identity import HostFolder, Identity
from weighbridge.hosts.pull import pull
from weighbridge.hosts.router import Slot, Slots
from weighbridge.hosts.runner import resident_bytes
from weighbridge.hosts.settings import HostSettings
from weighbridge.hosts.swap import Swapper
from weighbridge.registry.client import Client
from weighbridge.registry.errors import Conflict, NotFound, RegistryError, StaleEpoch, Unauthorized
from weighbridge.registry.schemas import Desired, Enrolment, Observed
from weighbridge.storage.local_cache import BlobCache

log = logging.getLogger(__name__)

T = TypeVar("T")
OpenClient = Callable[[str | None], Client]
"""Opens a client with this token."""
_LONGEST_PAUSE = 10.0
_SETTLE = 0.005
"""Seconds that news are collected for, so that one switch is one report."""


class Fenced(RuntimeError):
    """A newer process runs as this host: this one must end."""


class Refused(RuntimeError):
    """The registry does not let this host in."""


class Agent:
    """Everything of a host but its HTTP face. `url`: where that face is; informative."""

    def __init__(
        self, folder: HostFolder, settings: HostSettings, slots: Slots, open_client: OpenClient, *, name: str, url: str
    ) -> None:
        self._folder, self._settings, self._slots, self._open = folder, settings, slots, open_client
        self._name, self._url = name, url
        self._cache = BlobCache(folder.blobs)
        self._swapper = Swapper(slots, settings, self._on_slot)
        self._holdings: dict[str, Holding] = {}
        self._dropping: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._numbers = itertools.count(1)
        self._identity = folder.identity()
        self._epoch = 0
        self._client = open_client(self._token())

    async def run(self) -> None:
        """Serve until cancelled. Raises Fenced, and Refused when the registry does not let this host in."""
        self._slots.expected = None  # not ready before it is known what to serve
        self._swapper.prepare()
        if (last := self._folder.desired()) is not None and self._identity is not None:
            self._apply(last)
        try:
            await self._patiently(self._enrol)
            await self._work()
        finally:
            await self._close()

    async def _work(self) -> None:
        """Poll and report until one of them ends, which is an error, or the agent is cancelled."""
        tasks = [asyncio.create_task(self._poll(), name="poll"), asyncio.create_task(self._report(), name="report")]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _close(self) -> None:
        await asyncio.gather(*(holding.drop() for holding in self._holdings.values()), *self._dropping)
        await self._swapper.close()
        self._client.close()

    def _token(self) -> str | None:
        if self._identity is not None and self._identity.token is not None:
            return self._identity.token
        once = self._settings.enrolment_token
        return once.get_secret_value() if once else None

    async def _enrol(self) -> None:
        """Say who this is; a newer epoch fences whatever ran as this host before."""
        wanted = Enrolment(
            id=self._identity.id if self._identity else "",
            name=self._name,
            url=self._url,
            labels=self._settings.labels,
            device={"kind": self._settings.device},
        )
        enrolled = await asyncio.to_thread(self._client.enrol, wanted)
        self._epoch = enrolled.epoch
        token = enrolled.token or (self._identity.token if self._identity else None)
        self._identity = Identity(id=enrolled.id, token=token)
        self._folder.keep_identity(self._identity)
        self._client.close()
        self._client = self._open(self._token())
        log.info("enrolled as host %s, epoch %d, at %s", enrolled.id, enrolled.epoch, self._client.url)

    async def _poll(self) -> None:
        revision = -1
        while True:
            desired = await self._patiently(self._ask, revision)
            if desired.revision != revision:
                revision = desired.revision
                self._apply(desired)
                await asyncio.to_thread(self._folder.keep_desired, desired)

    async def _ask(self, revision: int) -> Desired:
        assert self._identity is not None
        wait = self._settings.poll_seconds
        return await _in_daemon_thread(partial(self._client.desired, self._identity.id, revision, wait))

    def _apply(self, desired: Desired) -> None:
        self._slots.expected = frozenset(model.model for model in desired.models if model.slots)
        for model in desired.models:
            if model.model not in self._holdings:
                self._holdings[model.model] = Holding(
                    model.model, self._swapper, str(self._folder.blobs), self._pull, self._news.set
                )
            self._holdings[model.model].want(model)
        for gone in self._holdings.keys() - {model.model for model in desired.models}:
            holding = self._holdings.pop(gone)
            task = asyncio.create_task(holding.drop())
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        self._news.set()

    async def _pull(self, artifact: str) -> Manifest:
        return await asyncio.to_thread(pull, self._client, self._cache, artifact)

    async def _report(self) -> None:
        """Report every change at once, and the counters every `report_seconds`; then let unused blobs go."""
        while True:
            self._news.clear()
            observed = self._observed()
            await self._patiently(self._say, observed)
            for holding in self._holdings.values():
                holding.reported()
            if all(holding.serves for holding in self._holdings.values()):
                await asyncio.to_thread(self._evict)
            try:
                await asyncio.wait_for(self._news.wait(), self._settings.report_seconds)
            except TimeoutError:
                continue
            await asyncio.sleep(_SETTLE)

    def _observed(self) -> Observed:
        interval_id = str(next(self._numbers))
        return Observed(
            epoch=self._epoch,
            models=[holding.observed(interval_id) for holding in self._holdings.values()],
            memory={"resident_bytes": float(resident_bytes())},
        )

    async def _say(self, observed: Observed) -> None:
        assert self._identity is not None
        await asyncio.to_thread(self._client.observed, self._identity.id, observed)

    def _evict(self) -> None:
        """Keep the blobs of what is wanted or resident. A manifest that is gone names nothing to keep."""
        keep: set[str] = set()
        for artifact in set().union(*(holding.artifacts for holding in self._holdings.values())):
            keep.add(artifact)
            keep.update(Manifest.model_validate_json(self._cache.path(artifact).read_bytes()).blobs())
        self._cache.evict(keep)

    def _on_slot(self, slot: Slot) -> None:
        self._news.set()

    async def _patiently(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call until it succeeds; enrol again where the registry says that it does not know this process."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda exc: isinstance(exc, RegistryError | OSError)),
            wait=tenacity.wait_random_exponential(0.2, max=_LONGEST_PAUSE),
        )
        said = ""
        async for attempt in retrying:
            with attempt:
                try:
                    return await call(*args)
                except StaleEpoch as exc:
                    raise Fenced(str(exc)) from exc
                except Unauthorized as exc:
                    raise Refused(
                        f"the registry does not let this host in: {exc}; give it a new enrolment token"
                    ) from exc
                except (NotFound, Conflict) as exc:
                    log.warning("%s: enrolling again", exc)
                    await self._enrol()
                    raise
                except (RegistryError, OSError) as exc:
                    if str(exc) != said:
                        log.warning("%s; what serves goes on", exc)
                    said = str(exc)
                    raise
        raise AssertionError("tenacity ends by returning or raising")


async def _in_daemon_thread(call: Callable[[], T]) -> T:
    """As asyncio.to_thread, for a call that may still wait when the process ends: nobody waits for the thread."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(deliver: Callable[[Any], None], what: object) -> None:
        if not answer.done():
            deliver(what)

    def work() -> None:
        try:
            result: object = call()
            deliver: Callable[[Any], None] = answer.set_result
        except BaseException as exc:  # handed over, not swallowed
            result, deliver = exc, answer.set_exception
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(tell, deliver, result)

    threading.Thread(target=work, name="poll", daemon=True).start()
    return await answer

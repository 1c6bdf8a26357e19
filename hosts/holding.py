"""One model on this host: bring what is wanted up beside what serves, prove it, switch, keep or retire the rest.

Knows the slots and the blobs; the registry only as the place that blobs come from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Literal

import tenacity

from weighbridge.engines.errors import EngineError
from weighbridge.engines.manifest import Manifest
from weighbridge.hosts.errors import GoldenFailed, HostError
from weighbridge.hosts.reports import as_interval
from weighbridge.hosts.router import Slot as Resident
from weighbridge.hosts.router import SlotSpec, State
from weighbridge.hosts.swap import Swapper
from weighbridge.registry.errors import RegistryError, Unavailable
from weighbridge.registry.schemas import DesiredModel, ObservedModel, ObservedSlot, Slot
from weighbridge.storage.errors import StorageError

log = logging.getLogger(__name__)

Pull = Callable[[str], Coroutine[Any, Any, Manifest]]
"""Brings an artifact's blobs here."""
Progress = Literal["pending", "pulling", "loading", "live", "failed"]
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
"""Seconds before a failed load is tried again: the cause may be this machine's, and gone by then."""


class Holding:
    """Follows what is wanted of one model. `changed` hears of everything worth a report."""

    def __init__(self, model: str, swapper: Swapper, blobs: str, pull: Pull, changed: Callable[[], None]) -> None:
        self.model = model
        self._swapper, self._blobs, self._pull, self._changed = swapper, blobs, pull, changed
        self._wanted = DesiredModel(model=model, generation=0, slots=[])
        self._progress: Progress = "pending"
        self._reason, self._golden_failed = "", False
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._follow(), name=f"hold {model}")

    @property
    def wanted(self) -> list[Slot]:
        return self._wanted.slots

    @property
    def failed(self) -> bool:
        """Whether what is wanted could not be brought up; it is tried again."""
        return self._progress == "failed"

    def want(self, wanted: DesiredModel) -> None:
        """Hold this from now on; a load under way that it makes pointless is given up."""
        if wanted == self._wanted:
            return
        before, self._wanted = self._live, wanted
        for slot in self._swapper.resident(self.model):
            slot.statistics.take("")  # what it did so far was for another generation
        if _key(self._live) != _key(before) or self._progress == "failed":
            self._golden_failed = False
            self._become("pending")
            self._news.set()
        self._changed()

    async def drop(self) -> None:
        """Hold nothing any more: finish what is in flight and end."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        await self._unload()

    def observed(self, interval_id: str) -> ObservedModel:
        """What to report now. It takes the counters: the report must arrive, once."""
        live = self._live
        slots = [] if live is None else [self._slot(live, interval_id)]
        return ObservedModel(model=self.model, generation=self._wanted.generation, slots=slots)

    @property
    def _live(self) -> Slot | None:
        return next((slot for slot in self._wanted.slots if slot.role == "live"), None)

    async def _follow(self) -> None:
        """Converge on every news. A turn that news overtake is cancelled and has ended before the next one begins."""
        while True:
            self._news.clear()
            turn = asyncio.create_task(self._converge())
            try:
                await self._news.wait()
            finally:
                turn.cancel()
                await asyncio.wait((turn,))

    async def _converge(self) -> None:
        live = self._live
        if live is None:
            await self._unload()
            return
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Exception),  # whatever it is: say it, and try again
            wait=tenacity.wait_exponential(_FIRST_PAUSE, max=_LONGEST_PAUSE),
            before_sleep=self._failed,
        )
        await retrying(self._serve, live)

    async def _serve(self, live: Slot) -> None:
        found = self._find(live)
        if found is None:
            self._become("pulling")
            manifest = await self._pull(live.artifact)
            self._become("loading")
            spec = SlotSpec(self.model, str(live.version), live.variant, live.artifact, manifest, self._blobs)
            found = await self._swapper.load(spec)
        elif found.state is not State.READY:
            self._become("loading")
            await found.settled()
        await self._swapper.go_live(found)
        self._golden_failed = False
        self._become("live")
        log.info("%s version %d (%s) is live", self.model, live.version, live.variant)

    def _find(self, wanted: Slot) -> Resident | None:
        """A resident slot that is what is wanted: after a roll back the previous one still is."""
        for slot in self._swapper.resident(self.model):
            if slot.proven and (slot.spec.version, slot.spec.variant, slot.spec.artifact) == _key(wanted):
                return slot
        return None

    async def _unload(self) -> None:
        await asyncio.gather(*(self._swapper.retire(slot) for slot in self._swapper.resident(self.model)))

    def _failed(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.error(
            "%s: generation %d failed: %s", self.model, self._wanted.generation, error, exc_info=_unforeseen(error)
        )
        # A registry that is away is not the artifact's fault: go on pulling, and say why it takes long.
        away = isinstance(error, Unavailable)
        self._golden_failed = isinstance(error, GoldenFailed)
        self._become("pulling" if away else "failed", str(error) or repr(error))

    def _become(self, progress: Progress, reason: str = "") -> None:
        if (progress, reason) != (self._progress, self._reason):
            self._progress, self._reason = progress, reason
            self._changed()

    def _slot(self, live: Slot, interval_id: str) -> ObservedSlot:
        found = self._find(live)
        progress, reason = self._progress, self._reason
        if progress == "live" and (found is None or found.state is not State.READY):
            progress, reason = "loading", (found and found.reason) or ""
        proven = "passed" if found is not None else "unchecked"
        return ObservedSlot(
            version=live.version,
            variant=live.variant,
            artifact=live.artifact,
            state=progress,
            reason=reason,
            golden="failed" if self._golden_failed else proven,
            interval=as_interval(found.statistics.take(interval_id)) if found is not None else None,
        )


def _key(slot: Slot | None) -> tuple[str, str, str] | None:
    """What makes two slots the same thing to load; roles and weights do not."""
    return None if slot is None else (str(slot.version), slot.variant, slot.artifact)


def _unforeseen(error: BaseException | None) -> BaseException | None:
    """The error, where its own words do not say enough."""
    foreseen = isinstance(error, HostError | EngineError | StorageError | RegistryError | OSError)
    return None if foreseen else error

"""One model on this host: bring what is wanted up beside what serves, prove it, switch, keep or retire the rest.

Knows the slots and the blobs; the registry only as the place that blobs come from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Literal, get_args

import tenacity

from weighbridge.engines.errors import EngineError
from weighbridge.engines.manifest import Manifest
from weighbridge.hosts.errors import GoldenFailed, HostError
from weighbridge.hosts.router import Slot as Resident
from weighbridge.hosts.router import SlotSpec, State
from weighbridge.hosts.statistics import BOUNDS
from weighbridge.hosts.statistics import Interval as Taken
from weighbridge.hosts.swap import Swapper
from weighbridge.registry.errors import RegistryError
from weighbridge.registry.schemas import DesiredModel, Interval, ObservedModel, ObservedSlot, Slot
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
        self._resident: list[Resident] = []
        self._progress: Progress = "pending"
        self._reason, self._golden_failed = "", False
        self._news = asyncio.Event()
        self._unreported: dict[Resident, Taken] = {}
        self._task = asyncio.create_task(self._follow(), name=f"hold {model}")

    @property
    def artifacts(self) -> set[str]:
        """What must stay in the cache: wanted, or resident."""
        return {slot.artifact for slot in self._wanted.slots} | {slot.spec.artifact for slot in self._resident}

    @property
    def serves(self) -> bool:
        """Whether what is wanted is what answers."""
        return self._progress == "live"

    def want(self, wanted: DesiredModel) -> None:
        """Hold this from now on; a load under way that it makes pointless is given up."""
        if wanted == self._wanted:
            return
        self._wanted = wanted
        self._news.set()

    async def drop(self) -> None:
        """Hold nothing any more: finish what is in flight and end."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._retire(*self._resident)

    def observed(self, interval_id: str) -> ObservedModel:
        """What to report now; counters stay in the report until `reported`."""
        live = self._live
        slots = [] if live is None else [self._slot(live, interval_id)]
        return ObservedModel(model=self.model, generation=self._wanted.generation, slots=slots)

    def reported(self) -> None:
        """The last report arrived: its counters are never told again."""
        self._unreported.clear()

    @property
    def _live(self) -> Slot | None:
        return next((slot for slot in self._wanted.slots if slot.role == "live"), None)

    async def _follow(self) -> None:
        """Converge on every news; a turn that news overtakes is cancelled where that is safe: while it waits."""
        while True:
            self._news.clear()
            turn = asyncio.create_task(self._converge())
            news = asyncio.create_task(self._news.wait())
            try:
                await asyncio.wait((turn, news), return_when=asyncio.FIRST_COMPLETED)
                if not turn.done():
                    turn.cancel()
                await asyncio.gather(turn, return_exceptions=True)
                await news
            finally:
                for task in (turn, news):
                    task.cancel()
                await asyncio.gather(turn, news, return_exceptions=True)

    async def _converge(self) -> None:
        live = self._live
        if live is None:
            self._become("pending")
            await self._retire(*self._resident)
            return
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((HostError, EngineError, StorageError, RegistryError, OSError)),
            wait=tenacity.wait_exponential(_FIRST_PAUSE, max=_LONGEST_PAUSE),
            before_sleep=self._failed,
        )
        async for attempt in retrying:
            with attempt:
                await self._serve(live)

    async def _serve(self, live: Slot) -> None:
        found = self._find(live)
        if found is None:
            self._become("pulling")
            manifest = await self._pull(live.artifact)
            self._become("loading")
            spec = SlotSpec(self.model, str(live.version), live.variant, live.artifact, manifest, self._blobs)
            found = await self._swapper.load(spec)
            self._resident.append(found)
        await self._swapper.go_live(found)
        self._resident = [slot for slot in self._resident if slot.state is not State.UNLOADING]
        self._become("live")
        log.info("%s version %d (%s) is live", self.model, live.version, live.variant)

    def _find(self, wanted: Slot) -> Resident | None:
        """A resident slot that is what is wanted: after a roll back the previous one still is."""
        spec = (str(wanted.version), wanted.variant, wanted.artifact)
        for slot in self._resident:
            if slot.state is State.READY and (slot.spec.version, slot.spec.variant, slot.spec.artifact) == spec:
                return slot
        return None

    async def _retire(self, *slots: Resident) -> None:
        await asyncio.gather(*(self._swapper.retire(slot) for slot in slots))
        self._resident = [slot for slot in self._resident if slot not in slots]

    def _failed(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        log.error("%s: generation %d failed: %s", self.model, self._wanted.generation, error)
        # A registry that is away is not the artifact's fault: go on pulling, and say why it takes long.
        away = isinstance(error, RegistryError)
        self._golden_failed = isinstance(error, GoldenFailed)
        self._become("pulling" if away else "failed", str(error) or repr(error))

    def _become(self, progress: Progress, reason: str = "") -> None:
        if (progress, reason) != (self._progress, self._reason):
            self._progress, self._reason = progress, reason
            self._changed()

    def _slot(self, live: Slot, interval_id: str) -> ObservedSlot:
        found = self._find(live) if self._progress == "live" else None
        progress = self._progress if self._progress != "live" or found is not None else "loading"
        assert progress in get_args(Progress)
        proven = "passed" if found is not None and found.proven else "unchecked"
        return ObservedSlot(
            version=live.version,
            variant=live.variant,
            artifact=live.artifact,
            state=progress,
            reason=self._reason,
            golden="failed" if self._golden_failed and progress == "failed" else proven,
            interval=self._interval(found, interval_id) if found is not None else None,
        )

    def _interval(self, resident: Resident, interval_id: str) -> Interval:
        taken = self._unreported.get(resident)
        if taken is None:
            taken = self._unreported[resident] = resident.statistics.take(interval_id)
        counts = {
            f"{bound:.9g}": count for bound, count in zip((*BOUNDS, float("inf")), taken.counts, strict=True) if count
        }
        return Interval(
            id=taken.id, seconds=taken.seconds, requests=taken.requests, errors=taken.errors, latency=counts
        )

"""The life of a slot: load beside, prove, switch, drain, keep the previous one, roll back, revive after a crash."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from weighbridge.hosts.children import Child, ChildProgram, Spares
from weighbridge.hosts.errors import HostError, LoadFailed, NotReady
from weighbridge.hosts.frames import Kind
from weighbridge.hosts.router import Slot, Slots, SlotSpec, State
from weighbridge.hosts.settings import HostSettings

log = logging.getLogger(__name__)


class Swapper:
    """Changes what `slots` serve, without dropping a request. `changed` hears of every state that a slot reaches."""

    def __init__(
        self,
        slots: Slots,
        settings: HostSettings,
        changed: Callable[[Slot], None] = lambda slot: None,
        program: ChildProgram = ChildProgram(),  # noqa: B008  it is frozen
    ) -> None:
        self._slots, self._settings, self._changed = slots, settings, changed
        self._spares = Spares(settings, program)
        self._previous: dict[str, Slot] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def prepare(self) -> None:
        """Start the first spare in the background."""
        self._spares.refill()

    async def load(self, spec: SlotSpec) -> Slot:
        """Bring a variant up beside what serves; afterwards its version can be addressed. Raises LoadFailed."""
        slot = Slot(spec)
        self._slots.add(slot)
        try:
            await self._bring_up(slot)
        except BaseException:
            self._slots.remove(slot)
            raise
        return slot

    async def go_live(self, slot: Slot) -> None:
        """Send unversioned requests to `slot`; the one before stays resident, the one before that is retired."""
        if slot.state is not State.READY:
            raise NotReady(f"{slot.spec.model} version {slot.spec.version} is {slot.state}: it cannot go live")
        model = slot.spec.model
        before = self._slots.switch(slot)
        if before is None or before is slot:
            return
        oldest = self._previous.pop(model, None)
        if self._settings.keep_previous:
            self._previous[model] = before
        else:
            self._run(self.retire(before))
        if oldest is not None and oldest is not slot:
            self._run(self.retire(oldest))

    def previous(self, model: str) -> Slot | None:
        """The resident slot that was live before, if it is kept."""
        return self._previous.get(model)

    async def roll_back(self, model: str) -> Slot:
        """Switch to the previous version, which is still resident. Raises NotReady."""
        if (slot := self._previous.get(model)) is None:
            raise NotReady(f"model {model!r} has no previous version resident on this host")
        await self.go_live(slot)
        return slot

    async def retire(self, slot: Slot) -> None:
        """Let no new request in, wait for those in flight, end the child."""
        if slot.state is State.UNLOADING:
            return
        self._slots.remove(slot)
        self._become(slot, State.UNLOADING, None)
        if self._previous.get(slot.spec.model) is slot:
            del self._previous[slot.spec.model]
        try:
            await asyncio.wait_for(slot.drained(), self._settings.drain_seconds)
        except TimeoutError:
            log.warning("%s still held %d requests when it was ended", _name(slot), slot.in_flight)
        if slot.child is not None:
            await slot.child.end()

    async def close(self) -> None:
        """End every child."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self.retire(slot) for slot in self._slots), self._spares.close())

    async def _bring_up(self, slot: Slot) -> None:
        child = await self._spares.take()
        try:
            await child.ask(Kind.LOAD, self._load_order(slot.spec), timeout=self._settings.load_seconds)
            await child.ask(Kind.GOLDEN, {"rounds": self._settings.warm_up}, timeout=self._settings.load_seconds)
        except BaseException as exc:
            await child.end(grace=0)
            if isinstance(exc, HostError):
                kind = type(exc) if isinstance(exc, LoadFailed) else LoadFailed
                raise kind(f"{_name(slot)} did not come up: {exc}") from exc
            raise
        finally:
            self._spares.refill()
        child.died = partial(self._on_death, slot)
        slot.child, slot.proven = child, True
        self._become(slot, State.READY, None)

    def _load_order(self, spec: SlotSpec) -> dict[str, Any]:
        return {
            "model": spec.model,
            "version": spec.version,
            "manifest": spec.manifest.canonical().decode(),
            "blobs": spec.blobs,
            "device": self._settings.device,
            "threads": self._settings.threads,
            "factories": self._settings.factories,
        }

    def _on_death(self, slot: Slot, child: Child) -> None:
        if slot.child is child and slot.state is State.READY:
            log.error("the engine child of %s (pid %d) died; bringing it up again", _name(slot), child.pid)
            slot.child = None
            self._become(slot, State.UNAVAILABLE, "its engine child died; bringing it up again")
            self._run(self._revive(slot, child))

    async def _revive(self, slot: Slot, dead: Child) -> None:
        await dead.end()  # reaps the process
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(LoadFailed), wait=wait_exponential(multiplier=0.5, max=30)
        )
        async for attempt in retrying:
            with attempt:
                if slot.state is not State.UNLOADING:
                    await self._bring_up(slot)
        if slot.state is State.UNLOADING and slot.child is not None:
            await slot.child.end()

    def _become(self, slot: Slot, state: State, reason: str | None) -> None:
        slot.state, slot.reason = state, reason
        self._changed(slot)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _name(slot: Slot) -> str:
    return f"{slot.spec.model} version {slot.spec.version} ({slot.spec.variant})"

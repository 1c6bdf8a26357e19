"""The life of a slot: load beside, prove, switch, drain, keep the previous one, roll back, revive after a crash."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from weighbridge.hosts.children import Child, ChildProgram, Spares
from weighbridge.hosts.errors import HostError, LoadFailed, NotReady
from weighbridge.hosts.frames import Kind
from weighbridge.hosts.meter import machine_bytes
from weighbridge.hosts.router import Slot, Slots, SlotSpec, State
from weighbridge.hosts.settings import HostSettings

log = logging.getLogger(__name__)

_FOR_REQUESTS, _LEAST_CHILDREN = 0.5, 2


class Swapper:
    """Changes what `slots` serve, without dropping a request. `changed` hears of every state that a slot reaches.

    `available` tells the machine's free memory, bytes.
    """

    def __init__(
        self,
        slots: Slots,
        settings: HostSettings,
        changed: Callable[[Slot], None] = lambda slot: None,
        program: ChildProgram = ChildProgram(),  # noqa: B008  it is frozen
        available: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
    ) -> None:
        self._slots, self._settings, self._changed, self._available = slots, settings, changed, available
        self._spares = Spares(settings, program)
        self._previous: dict[str, Slot] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._reviving: dict[Slot, asyncio.Task[None]] = {}
        self._machine = machine_bytes()
        self._watch: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Start the first spare in the background, and the watch over children that hang."""
        self._spares.refill()
        self._watch = asyncio.create_task(self._replace_hung(), name="watch")

    def resident(self, model: str) -> tuple[Slot, ...]:
        """What is loaded of a model, or loading; nothing that was retired."""
        return self._slots.of(model)

    async def load(self, spec: SlotSpec) -> Slot:
        """Bring a variant up beside what serves; afterwards its version can be addressed. Raises LoadFailed."""
        previous = self._previous.get(spec.model)
        if previous is not None and not self._fits(spec):
            log.info("memory is short: %s is let go before another version loads", _name(previous))
            await self.retire(previous)
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
        if oldest is not None and oldest is not slot:
            self._retire_later(oldest)
        if self._settings.keep_previous and before.state is State.READY and self._fits(slot.spec):
            self._previous[model] = before
        else:
            self._retire_later(before)

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
        if self._withdraw(slot):
            await self._drain(slot)

    async def close(self) -> None:
        """Finish what is in flight and end every child."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(self.retire(slot) for slot in self._slots))
        await asyncio.gather(*self._retiring, self._spares.close())

    def _retire_later(self, slot: Slot) -> None:
        if self._withdraw(slot):
            task = asyncio.create_task(self._drain(slot))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _withdraw(self, slot: Slot) -> bool:
        """Take the slot out of the routes at once; False when it is out already."""
        if slot.state is State.UNLOADING:
            return False
        self._slots.remove(slot)
        if self._previous.get(slot.spec.model) is slot:
            del self._previous[slot.spec.model]
        self._become(slot, State.UNLOADING)
        return True

    async def _drain(self, slot: Slot) -> None:
        try:
            if (revival := self._reviving.pop(slot, None)) is not None:
                revival.cancel()
                await asyncio.wait((revival,))
            await asyncio.wait_for(slot.drained(), self._settings.drain_seconds)
        except TimeoutError:
            log.warning("%s still held %d requests when it was ended", _name(slot), slot.in_flight)
        finally:
            if slot.child is not None:
                await slot.child.end()

    def _fits(self, spec: SlotSpec) -> bool:
        """Whether one more copy of these weights fits into memory; a guess, as nothing is known but their files."""
        return self._available() > sum(file.size for file in spec.manifest.files)

    async def _bring_up(self, slot: Slot) -> None:
        child = await self._spares.take()
        try:
            await child.ask(Kind.LOAD, self._load_order(slot.spec), timeout=self._settings.load_seconds)
            await child.ask(Kind.GOLDEN, {"rounds": self._settings.warm_up}, timeout=self._settings.load_seconds)
            if not child.alive or slot.state is State.UNLOADING:
                raise LoadFailed("it was ended")
        except BaseException as exc:
            child.kill()
            await child.end()
            if isinstance(exc, HostError):
                kind = type(exc) if isinstance(exc, LoadFailed) else LoadFailed
                raise kind(f"{_name(slot)} did not come up: {exc}") from exc
            raise
        finally:
            self._spares.refill()
        child.died = partial(self._on_death, slot)
        slot.child, slot.proven = child, True
        self._become(slot, State.READY)

    async def _replace_hung(self) -> None:
        """End children that have work and are silent for too long; their death brings the version up again."""
        limit = self._settings.hang_seconds
        while True:
            await asyncio.sleep(min(limit / 4, 1.0))
            for slot, child in [(slot, slot.child) for slot in self._slots if slot.child is not None]:
                if (silent := child.silent_for(time.monotonic())) >= limit:
                    log.error("the engine child of %s gave no sign for %.1f s: it is ended", _name(slot), silent)
                    await child.replace(silent)
                else:
                    child.at_work()  # so that whoever asks in a moment hears of that moment

    def _load_order(self, spec: SlotSpec) -> dict[str, Any]:
        return {
            "model": spec.model,
            "version": spec.version,
            "manifest": spec.manifest.canonical().decode(),
            "blobs": spec.blobs,
            "device": self._settings.device,
            "threads": self._settings.threads,
            "factories": self._settings.factories,
            "memory": self._settings.request_memory_bytes or self._share(),
        }

    def _share(self) -> int:
        """Bytes that a request may take: half of the machine is for requests, in equal parts for what is resident."""
        return int(self._machine * _FOR_REQUESTS / max(_LEAST_CHILDREN, sum(1 for _ in self._slots)))

    def _on_death(self, slot: Slot, child: Child) -> None:
        if slot.child is child and slot.state is State.READY:
            log.error("the engine child of %s (pid %d) died; bringing it up again", _name(slot), child.pid)
            slot.child = None
            self._become(slot, State.UNAVAILABLE, "its engine child died; bringing it up again")
            self._reviving[slot] = asyncio.create_task(self._revive(slot, child))

    async def _revive(self, slot: Slot, dead: Child) -> None:
        """Until it is up, or retired."""

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.error("%s", error)
            self._become(slot, State.UNAVAILABLE, f"its engine child died, and another did not start: {error}")

        await dead.end()  # reaps the process
        wait = wait_exponential(multiplier=0.5, max=30)
        await AsyncRetrying(retry=retry_if_exception_type(LoadFailed), wait=wait, before_sleep=say)(
            self._bring_up, slot
        )
        self._reviving.pop(slot, None)

    def _become(self, slot: Slot, state: State, reason: str | None = None) -> None:
        slot.become(state, reason)
        self._changed(slot)


def _name(slot: Slot) -> str:
    return f"{slot.spec.model} version {slot.spec.version} ({slot.spec.variant})"

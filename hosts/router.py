"""Which slot answers a request: per model one immutable route, replaced in one assignment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from weighbridge.engines.manifest import Manifest
from weighbridge.hosts.children import Child
from weighbridge.hosts.errors import ModelNotFound, NotReady, VersionNotLoaded
from weighbridge.hosts.statistics import Statistics


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


class State(StrEnum):
    """The protocol's states of a version on a server."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True)
class SlotSpec:
    """What to hold: one variant of one version. `blobs` is the folder of verified blobs."""

    model: str
    version: str
    variant: str
    artifact: str
    manifest: Manifest
    blobs: str


@dataclass(eq=False)
class Slot:
    """One resident variant: its child, its state, the requests it holds now and what it did so far."""

    spec: SlotSpec
    child: Child | None = None
    state: State = State.LOADING
    reason: str | None = None
    proven: bool = False
    """Whether the reference golden passed on this host."""
    statistics: Statistics = field(default_factory=Statistics)
    in_flight: int = 0
    waiting: int = 0
    """Requests that wait until its child is brought up again."""
    _idle: asyncio.Event | None = None
    _settled: asyncio.Event = field(default_factory=_set)

    def become(self, state: State, reason: str | None = None) -> None:
        self.state, self.reason = state, reason
        if state is State.UNAVAILABLE:
            self._settled.clear()
        else:
            self._settled.set()

    async def settled(self) -> None:
        """Wait while its child is being brought up again."""
        await self._settled.wait()

    def enter(self) -> Child:
        """Count a request in; the caller must `leave`. Raises NotReady."""
        if self.state is not State.READY or self.child is None:
            raise NotReady(f"{self.spec.model} version {self.spec.version} is {self.state}: {self.reason}")
        self.in_flight += 1
        return self.child

    def leave(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0 and self._idle is not None:
            self._idle.set()

    async def drained(self) -> None:
        """Wait until no request is in flight; only meaningful once no route leads here."""
        while self.in_flight:
            self._idle = asyncio.Event()
            await self._idle.wait()
        self._idle = None


@dataclass(frozen=True)
class Route:
    """Where a model's requests go: unversioned ones to `live`, others to the version they name.

    Weighted roles belong here: `pick` is the only place that chooses.
    """

    live: Slot | None = None
    slots: tuple[Slot, ...] = ()
    versions: Mapping[str, Slot] = field(init=False)
    """By version; of two variants of one version the live one, else the one added last."""

    def __post_init__(self) -> None:
        last = () if self.live is None else (self.live,)
        object.__setattr__(self, "versions", {slot.spec.version: slot for slot in (*self.slots, *last)})

    def pick(self) -> Slot | None:
        return self.live


class Slots:
    """All routes of this host. Changes are made on the event loop; every request sees one whole route.

    `hang_seconds`: a child that has work and is silent for this long does not count as one that answers.
    """

    def __init__(self, hang_seconds: float = float("inf")) -> None:
        self._routes: dict[str, Route] = {}
        self._hang_seconds = hang_seconds
        self._served: set[str] = set()
        self.expected: frozenset[str] | None = frozenset()
        """Models that are assigned to this host; None: nobody has said yet which."""
        self.certain = True
        """Whether the registry itself has said so; what a host remembers from its last run may be old."""
        self.awaited: frozenset[str] = frozenset()
        """Models whose first version readiness waits for: those that this process was started to serve."""

    def route(self, model: str) -> Route:
        """Raises ModelNotFound, NotReady while the model may still come."""
        if (route := self._routes.get(model)) is not None:
            return route
        if self.expected is None or not self.certain:
            raise NotReady(f"this host does not know yet whether it serves model {model!r}")
        if model in self.expected:
            raise NotReady(f"model {model!r} is assigned to this host and being brought up")
        raise ModelNotFound(f"model {model!r} is not assigned to this host")

    def assign(self, models: frozenset[str], *, certain: bool) -> None:
        """These models are to be served here; the first time, readiness waits for all of them."""
        if self.expected is None:
            self.awaited = models
        self.expected, self.certain = models, self.certain or certain
        self.awaited &= models
        self._served &= models

    def give_up(self, model: str) -> None:
        """It cannot be brought up for now: what never served takes no readiness from what does."""
        self.awaited -= {model}

    def find(self, model: str, version: str | None) -> Slot:
        """The slot that answers now. Raises ModelNotFound, VersionNotLoaded, NotReady."""
        route = self.route(model)
        slot = route.pick() if version is None else route.versions.get(version)
        if slot is None and version is None:
            raise NotReady(f"model {model!r} has no live version on this host yet")
        if slot is None:
            held = ", ".join(sorted(route.versions)) or "none"
            raise VersionNotLoaded(f"model {model!r} version {version!r} is not on this host (held: {held})")
        return slot

    def elder(self, slot: Slot) -> Slot | None:
        """What served the model before `slot` and could still answer; None where nothing did or it is gone."""
        held = self.of(slot.spec.model)
        older = held[: held.index(slot)] if slot in held else ()
        return next((one for one in reversed(older) if one.state is State.READY), None)

    def of(self, model: str) -> tuple[Slot, ...]:
        """Every slot of a model, in the order in which they were added."""
        return self._routes.get(model, Route()).slots

    def add(self, slot: Slot) -> None:
        """Make a slot addressable by its version; no unversioned request goes there."""
        route = self._routes.get(slot.spec.model, Route())
        self._routes[slot.spec.model] = replace(route, slots=(*route.slots, slot))

    def switch(self, slot: Slot) -> Slot | None:
        """Send the model's unversioned requests to `slot`; answers the slot that had them."""
        route = self.route(slot.spec.model)
        self._routes[slot.spec.model] = replace(route, live=slot)
        self._served.add(slot.spec.model)
        return route.live

    def remove(self, slot: Slot) -> None:
        """Let no new request reach the slot. Twice is no error."""
        route = self._routes.get(slot.spec.model, Route())
        live = None if route.live is slot else route.live
        if others := tuple(other for other in route.slots if other is not slot):
            self._routes[slot.spec.model] = Route(live, others)
        else:
            self._routes.pop(slot.spec.model, None)
            if not self.expected or slot.spec.model not in self.expected:
                self._served.discard(slot.spec.model)

    def ready(self) -> bool:
        """Whether every model that has served here still does, and those that this process was started for.

        A model that joins later takes no readiness from the others while it loads; with nothing live there is none.
        """
        if self.expected is None:
            return False
        if not all(self._answers(model) for model in self._served | self.awaited):
            return False
        return bool(self._served) or not self.expected

    def _answers(self, model: str) -> bool:
        slot = self._routes.get(model, Route()).live
        if slot is None or slot.state is not State.READY or slot.child is None:
            return False
        return slot.child.silent_for(time.monotonic()) < self._hang_seconds

    def __iter__(self) -> Iterator[Slot]:
        for route in list(self._routes.values()):
            yield from route.slots

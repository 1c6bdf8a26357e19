"""A host without processes or sockets: the same protocol with the registry, sessions in this process.

For the story, for tests, and for whoever wants predictions that follow the champion in a notebook. It serves nobody
else and measures nothing but its own requests; `hosts.agent` is the one for production.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weighbridge.engines import golden
from weighbridge.engines.errors import EngineError, GoldenMismatch, InvalidInput
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import Array, BlobPath, Session
from weighbridge.hosts.blame import Blame
from weighbridge.hosts.errors import ModelNotFound, NotReady
from weighbridge.hosts.pull import pull
from weighbridge.hosts.reports import as_interval
from weighbridge.hosts.statistics import Statistics
from weighbridge.hosts.witness import Witness
from weighbridge.registry.client import Client
from weighbridge.registry.errors import Invalid
from weighbridge.registry.schemas import (
    DesiredModel,
    Enrolment,
    Observed,
    ObservedModel,
    ObservedSlot,
    Slot,
)
from weighbridge.storage.errors import StorageError
from weighbridge.storage.local_cache import BlobCache


@dataclass
class _Held:
    """A model as it is here: what serves, and what of the wanted slot came of it."""

    slot: Slot
    """What is wanted."""
    live: Slot | None = None
    session: Session | None = None
    reason: str = ""
    golden_failed: bool = False
    witness: Witness | None = None
    statistics: Statistics = field(default_factory=Statistics)


class MemoryHost:
    """Enrols at once; `converge` is one breath of the agent: ask what to hold, hold it, report.

    `kind`: the hardware fingerprint that it claims to be of (engines.hardware); empty: it gets originals.
    """

    def __init__(
        self,
        client: Client,
        folder: Path,
        *,
        name: str,
        labels: Mapping[str, str] | None = None,
        kind: str = "",
        load: Callable[[Manifest, BlobPath], Session] = load,
    ) -> None:
        self._client, self._cache, self._load = client, BlobCache(folder), load
        enrolled = client.enrol(Enrolment(name=name, labels=dict(labels or {}), device={"kind": kind}))
        self.id, self._epoch = enrolled.id, enrolled.epoch
        self._held: dict[str, _Held] = {}
        self._generations: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._unsaid: Observed | None = None
        self.broken: set[int] = set()
        """Versions that this host cannot load: how a test breaks a machine."""

    def converge(self) -> None:
        """Make this host what the registry wants, and say so. Raises RegistryError when the registry is away.

        A report that did not arrive is repeated before anything else; the registry counts each once.
        """
        self._say()
        desired = self._client.desired(self.id)
        for model in desired.models:
            self._hold(model)
        for gone in self._held.keys() - {model.model for model in desired.models}:
            self._drop(gone)
        self._unsaid = Observed(epoch=self._epoch, models=[self._seen(model) for model in desired.models])
        self._say()

    def infer(self, model: str, inputs: Mapping[str, Array]) -> tuple[int, dict[str, Array]]:
        """Answer as the live version: its number and the outputs. Raises ModelNotFound, NotReady, EngineError."""
        held = self._held.get(model)
        if held is None:
            raise ModelNotFound(f"model {model!r} is not assigned to this host")
        if held.session is None or held.live is None:
            raise NotReady(f"version {held.slot.version} of {model} is not live: {held.reason}")
        fault, began = Blame.NONE, time.monotonic()
        try:
            return held.live.version, held.session.infer(inputs)
        except InvalidInput:
            fault = Blame.REFUSED
            raise
        except Exception:
            fault = Blame.VERSION if held.witness is None or held.witness.fails() else Blame.INPUT
            raise
        finally:
            held.statistics.record(fault, time.monotonic() - began)

    def _say(self) -> None:
        if self._unsaid is not None:
            self._client.observed(self.id, self._unsaid)
            self._unsaid = None

    def _hold(self, wanted: DesiredModel) -> None:
        self._generations[wanted.model] = wanted.generation
        slot = next((slot for slot in wanted.slots if slot.role == "live"), None)
        if slot is None:
            self._drop(wanted.model)
            return
        held = self._held.setdefault(wanted.model, _Held(slot))
        held.slot = slot
        if held.live is None or held.live.artifact != slot.artifact:
            self._swap(held, slot)
        else:
            held.live, held.reason = slot, ""

    def _swap(self, held: _Held, slot: Slot) -> None:
        """Load beside what serves, prove it, then switch: what serves goes on when the new one fails."""
        try:
            session, witness = self._proven(slot)
        except (EngineError, Invalid, StorageError) as exc:  # Invalid: the registry hands out no damaged blob
            held.reason, held.golden_failed = str(exc), isinstance(exc, GoldenMismatch)
            return
        held.golden_failed = False
        before, held.live, held.session, held.reason = held.session, slot, session, ""
        held.witness, held.statistics = witness, Statistics()
        if before is not None:
            before.close()

    def _proven(self, slot: Slot) -> tuple[Session, Witness]:
        if slot.version in self.broken:
            raise StorageError("this host was told to fail")
        manifest = pull(self._client, self._cache, slot.artifact)
        session = self._load(manifest, self._cache.path)
        wanted = manifest.golden
        data = self._cache.path(wanted.digest).read_bytes()
        golden.check(session, data, *wanted.tolerance)
        return session, Witness(session, data, wanted.tolerance)

    def _drop(self, model: str) -> None:
        held = self._held.pop(model, None)
        if held is not None and held.session is not None:
            held.session.close()

    def _seen(self, wanted: DesiredModel) -> ObservedModel:
        held = self._held.get(wanted.model)
        slots = [self._slot(held)] if held is not None else []
        return ObservedModel(model=wanted.model, generation=self._generations[wanted.model], slots=slots)

    def _slot(self, held: _Held) -> ObservedSlot:
        live = held.live is not None and held.live.artifact == held.slot.artifact
        interval = as_interval(held.statistics.take(str(next(self._numbers))))
        return ObservedSlot(
            version=held.slot.version,
            variant=held.slot.variant,
            artifact=held.slot.artifact,
            state="live" if live else "failed",
            reason=held.reason,
            golden="passed" if live else "failed" if held.golden_failed else "unchecked",
            interval=interval if live else None,
        )

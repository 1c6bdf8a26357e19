"""From hints to versions: looks at what an event or a listing pointed at, and records what it finds, once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

from weighbridge import limits
from weighbridge.daemon.layout import Group, Layout, Wishes
from weighbridge.daemon.look import Finding, Found, Gone, Refused, Waits, look
from weighbridge.daemon.looks import PARKED, Looks, Order, Urgency
from weighbridge.daemon.loops import AWAY, Turning
from weighbridge.daemon.reading import Reading
from weighbridge.registry import checkpoints, identity, lineage, versions
from weighbridge.registry.checkpoints import Sight
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import Invalid
from weighbridge.registry.identity import Change
from weighbridge.registry.lifecycle import CheckpointState
from weighbridge.registry.models import Checkpoint
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy, policy_for
from weighbridge.storage.events import Kind, ObjectEvent
from weighbridge.storage.pins import pins_digest
from weighbridge.storage.protocols import Store

log = logging.getLogger(__name__)

ACTOR = "intake"
_LONGEST_PAUSE = 60.0
_MOMENT, _NOTES = 0.05, 64
"""Seconds of looks, and looks, whose findings are noted together."""
_READ_PAUSE = 30.0
"""Seconds until weights that could not be read are asked for again; whoever has read them gives a hint."""


class Intake:
    """The loop's body: one due checkpoint a turn, in any number of threads. `tell` takes hints from any thread.

    `processor` tells how many seconds of it a thread used: as long rests what nobody waits for.
    `rescan(prefix)` is called where an event says that anything may have happened below a prefix, `judged(model)` where
    what judges a model's checkpoints may be another now.
    """

    name = "intake"

    def __init__(
        self,
        store: Store,
        layout: Layout,
        db: Database,
        notifier: Notifier,
        looks: Looks,
        reading: Reading,
        *,
        policies: Sequence[Policy] = (),
        settle_seconds: float = 0.0,
        rescan: Callable[[str], None] = lambda prefix: None,
        judged: Callable[[str], None] = lambda model: None,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        processor: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._store, self._layout, self._db, self._notifier, self._looks = store, layout, db, notifier, looks
        self._policies, self._rescan, self._wake, self._clock = tuple(policies), rescan, wake, clock
        self._settle, self._reading, self._judged, self._processor = settle_seconds, reading, judged, processor
        self._lock = threading.Lock()
        self._changed: set[str] = set()
        """Models whose recipe, evaluation or training set changed."""

    def tell(self, event: ObjectEvent) -> None:
        """Take a hint: whose checkpoint is it, and when to look. Nothing in it is believed."""
        scope = self._layout.scope(event.key) if event.kind is Kind.RESCAN else self._layout.place(event.key)
        match scope:
            case Group():
                self.hint(scope)
            case Wishes(model=model):
                self.changed(model)
            case str():
                self._rescan(scope)

    def hint(
        self,
        group: Group,
        place: Order | None = None,
        urgency: Urgency = Urgency.TOLD,
        batch: int | None = None,
    ) -> None:
        """Look at it as soon as possible; `place` is its order among its model's, where the hint tells."""
        self._looks.hint(group, self._clock(), place, urgency, batch)
        self._wake()

    def changed(self, model: str) -> None:
        """What judges this model's checkpoints may be another now: look again at what waits, and at what was judged."""
        with self._lock:
            self._changed.add(model)
        self._wake()
        self._judged(model)

    def once(self, turning: Turning) -> float:
        """Look at due groups for a moment; return the seconds until the next is due.

        Versions are recorded one by one, at once. What is only noted is noted together: a commit costs a sync.
        """
        self._hint_waiting()
        notes: list[tuple[Group, Finding]] = []
        end, used = self._clock() + _MOMENT, self._processor()
        try:
            while len(notes) < _NOTES and (group := self._looks.take(self._clock())) is not None:
                self._wake()  # another thread watches over what is due while this one looks, however long that takes
                self._look(group, notes)
                if turning.stopping or self._clock() >= end:
                    break
        finally:
            self._note_all(notes)
            self._looks.spent(self._processor() - used, self._clock())
        return self._pause()

    def _pause(self) -> float:
        return max(0.0, min(self._looks.next_due() - self._clock(), _LONGEST_PAUSE))

    def _hint_waiting(self) -> None:
        """What judges a model's checkpoints changed: look again at all that are undecided, whoever saw them first."""
        with self._lock:
            models, self._changed = self._changed, set()
        try:
            for model in models:
                with self._db.read() as tx:
                    paths = checkpoints.waiting_paths(tx, model, PARKED)
                for path in paths:
                    self._looks.hint(Group(model, path), self._clock())
        except BaseException:
            with self._lock:
                self._changed |= models
            raise

    def _look(self, group: Group, notes: list[tuple[Group, Finding]]) -> None:
        then = self._looks.again
        try:
            finding = look(self._store, self._layout, group, now=datetime.now(UTC))
            if isinstance(finding, Found):
                pause, digest = self._prepare(group, finding)
                if pause > 0:
                    then = partial(self._looks.again_in, seconds=pause)
                    return
                self._record(group, finding, digest)
                then = self._looks.forget
            else:
                notes.append((group, finding))
                if not isinstance(finding, Waits):
                    then = self._looks.forget
        except AWAY:
            raise  # Nothing was found out. The loop says so, once, and backs off.
        except Exception as error:
            # One checkpoint that cannot be looked at holds up no other.
            log.warning("%s cannot be looked at: %s", group.path, error, exc_info=True)
            fault = f"a fault of Weighbridge ({type(error).__name__}), see the daemon's log"
            reason = f"{group.path} cannot be looked at: {fault}"
            notes.append((group, Waits(reason, "", failed=True)))
        finally:
            if then == self._looks.forget:
                self._reading.forget(group)
            then(group, now=self._clock())

    def _prepare(self, group: Group, found: Found) -> tuple[float, str | None]:
        """Seconds until it may be recorded (0: now), and the digest of its weights where they had to be read."""
        place = found.order(group)
        self._looks.place(group, place)
        if (wait := self._unsettled(group, found)) > 0:
            return wait, None
        change, digest = self._changed_how(group, found)
        if change is Change.UNKNOWN:
            failed = self._reading.failure(group)
            reason = f"{group.path} is being read, to see whether these weights are known"
            self._note_all([(group, Waits(failed or reason, found.seen, found.weights, failed=failed is not None))])
            return _READ_PAUSE, None
        return self._looks.older(group, place, self._clock()) if change is Change.NEW else 0.0, digest

    def _unsettled(self, group: Group, found: Found) -> float:
        """Seconds to wait for companions that may follow. Quiet is what was watched: a file's date may be any."""
        if not found.may_grow(group):
            return 0.0
        return self._settle - self._looks.unchanged(group, found.seen, self._clock())

    def _changed_how(self, group: Group, found: Found) -> tuple[Change, str | None]:
        """What its weights are, as far as it is known. Wrong ones are read too: they have no judgement that does it."""
        with self._db.read() as tx:
            known = identity.current(tx, group.model, group.path)
        change, digest = identity.compare(known, found.weights, None), None
        if change is Change.UNKNOWN or (change is Change.NEW and found.wrong is not None):
            digest = self._reading.digest(group, found.weights)
            change = Change.UNKNOWN if digest is None else identity.compare(known, found.weights, digest)
        return change, digest

    def _note_all(self, notes: Sequence[tuple[Group, Finding]]) -> None:
        """Write down what is no version, in one short transaction, and nothing where it is known: others write too."""
        findings = {(group.model, group.path): (group, finding) for group, finding in notes}
        if not findings:
            return
        with self._db.read() as tx:
            rows = checkpoints.known(tx, findings.keys())
        sights = {place: _sight(*found) for place, found in findings.items()}
        news = [place for place, sight in sights.items() if _is_news(rows.get(place), sight)]
        if not news:
            return
        with self._db.transaction() as tx:
            first = [sight for place in news if place not in rows and (sight := sights[place]) is not None]
            others = checkpoints.first_seen(tx, first)
            for place in news:
                if place in rows or place in others:
                    self._note(tx, *findings[place])
        self._notifier.ring("events")

    def _record(self, group: Group, found: Found, digest: str | None) -> None:
        """Write down a version, or why the registry takes none."""
        try:
            with self._db.transaction() as tx:
                self._write_version(tx, group, found, digest)
        except Invalid as error:
            # A rule of the registry that the layout does not know.
            self._note_all([(group, Refused(f"{group.path}: {error}", found.seen))])
        self._notifier.ring("events")
        self._notifier.ring("jobs")

    def _note(self, tx: Session, group: Group, finding: Finding) -> None:
        match finding:
            case Gone():
                checkpoints.removed(tx, group.model, group.path)
            case Waits(failed=False) | Refused() if identity.is_less(
                identity.current(tx, group.model, group.path), finding.weights
            ):
                # What was recorded from here is not undone by what is taken away, or put beside it.
                checkpoints.keep(tx, group.model, group.path, seen=finding.seen)
            case Waits(reason=reason, seen=seen, needs_person=needs_person):
                checkpoints.waiting(tx, group.model, group.path, reason=reason, seen=seen, needs_person=needs_person)
            case Refused(reason=reason, seen=seen):
                checkpoints.refused(tx, group.model, group.path, reason=reason, seen=seen)

    def _write_version(self, tx: Session, group: Group, found: Found, digest: str | None) -> None:
        recorded = versions.record(
            tx,
            model=group.model,
            path=group.path,
            files=found.files,
            pins_digest=pins_digest(found.files),
            proof=found.proof,
            proof_reason=found.reason,
            unproven=found.unproven,
            recipe_text=found.judges.recipe_text,
            policy=policy_for(group.model, self._policies),
            eval_pin=found.judges.evaluation,
            train_pin=found.judges.training,
            weights=digest,
            refused=found.wrong,
            seen=found.seen,
            actor=ACTOR,
        )
        if recorded.created:
            lineage.keep(tx, group.model, recorded.version, found.lineage)
            log.info(
                "%s is version %d of %s (%s)",
                group.path,
                recorded.version.number,
                group.model,
                found.wrong or f"{found.proof}: {found.reason}",
            )


def _sight(group: Group, finding: Finding) -> Sight | None:
    """What a row says of it; None: there is none."""
    match finding:
        case Waits(reason=reason, seen=seen, needs_person=needs_person):
            state = CheckpointState.WAITING
        case Refused(reason=reason, seen=seen):
            state, needs_person = CheckpointState.REFUSED, True
        case _:
            return None
    return Sight(group.model, group.path, state, limits.prose(reason), seen, needs_person)


def _is_news(row: Checkpoint | None, sight: Sight | None) -> bool:
    if sight is None:  # gone, and what versions came from stays
        return row is not None and row.state != CheckpointState.COMPLETE
    return row is None or not sight.is_told_by(row)

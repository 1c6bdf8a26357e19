"""Re-derives from the database what a lost event, message or process left undone. Doing it twice changes nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from sqlalchemy import select
from sqlmodel import col

from weighbridge.daemon.loops import Turning
from weighbridge.registry import champion, events, jobs, rollouts, stored, variants, versions
from weighbridge.registry.clock import now
from weighbridge.registry.db import Database, Session, clock
from weighbridge.registry.errors import FencedOut
from weighbridge.registry.lifecycle import ACTIVE_ROLLOUT, JobState
from weighbridge.registry.models import Alias, Job, Rollout
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy
from weighbridge.workers import rollout as rollout_steps

log = logging.getLogger(__name__)

ACTOR = "reconcile"
CONTROL = "control"
_BATCH = 100
_PAUSE = 5.0
"""Seconds until a step that failed is tried again."""


class Reconcile:
    """The loop's body: expired leases, versions without a next job, rollouts without a step, hosts that drifted."""

    name = "reconcile"

    def __init__(
        self, db: Database, notifier: Notifier, *, policies: Sequence[Policy] = (), seconds: float = 5.0
    ) -> None:
        self._db, self._notifier, self._policies, self._seconds = db, notifier, tuple(policies), seconds

    def once(self, turning: Turning) -> float:
        repaired = self._expire() + self._advance() + self._improve() + self._step()
        converged = self._converge()
        if repaired or converged:
            for topic in ("jobs", "events", *(["hosts"] if converged else [])):
                self._notifier.ring(topic)
        return self._seconds

    def _expire(self) -> int:
        """Take jobs from workers that stopped reporting."""
        with self._db.transaction() as tx:
            expired = jobs.expire(tx)
        for job_id in expired:
            log.warning("job %d: its worker stopped reporting: queued again, set aside, or failed", job_id)
        return len(expired)

    def _advance(self) -> int:
        """Draw the conclusion for versions whose jobs are over."""
        with self._db.read() as tx:
            overdue = versions.overdue(tx, _BATCH)
        for version_id in overdue:
            with self._alone("version", version_id, versions.give_up), self._db.transaction() as tx:
                versions.advance(tx, version_id, actor=ACTOR, policies=self._policies)
        return len(overdue) + self._advance_variants()

    def _advance_variants(self) -> int:
        """The same for variants, and the better ones that are ready for a fleet."""
        with self._db.read() as tx:
            overdue = variants.overdue(tx, _BATCH)
        for variant_id in overdue:
            with self._alone("variant", variant_id, variants.give_up), self._db.transaction() as tx:
                variants.advance(tx, variant_id, actor=ACTOR, policies=self._policies)
        return len(overdue)

    @contextlib.contextmanager
    def _alone(self, what: str, row_id: int, give_up: Callable[[Session, int, str, str], None]) -> Iterator[None]:
        """What one subject's rows do to whoever reads them ends that subject, with the reason, and not the loop."""
        try:
            yield
        except stored.BROKEN as exc:
            if not stored.is_unreadable(exc):
                raise
            log.warning("%s %d cannot be read", what, row_id, exc_info=exc)
            with self._db.transaction() as tx:
                give_up(tx, row_id, f"what is stored of it cannot be read ({type(exc).__name__}: {exc})", ACTOR)

    def _step(self) -> int:
        """Give every rollout under way its step's job."""
        with self._db.read() as tx:
            going = [row.id for row in rollouts.listing(tx, going=True, limit=1000) if row.id is not None]
            idle = [rollout_id for rollout_id in going if not _has_open_job(tx, rollout_id)]
        inserted = 0
        for rollout_id in idle:
            with _others_go_on("rollout", rollout_id), self._db.transaction() as tx:
                rollout = rollouts.lock(tx, rollout_id)
                if rollout.status in ACTIVE_ROLLOUT and not _has_open_job(tx, rollout_id):
                    self._next_job(tx, rollout)
                    inserted += 1
        return inserted

    def _next_job(self, tx: Session, rollout: Rollout) -> None:
        if rollouts.next_job(tx, rollout) is None:
            # The step's job ended without taking it (its attempts were used up): a new step number, a new job.
            rollouts.add_step(tx, rollout, "retry", {"reason": "the step's job ended without taking it"}, actor=ACTOR)
            rollouts.next_job(tx, rollout)

    def _converge(self) -> list[str]:
        """Give hosts that joined a fleet what the fleet serves."""
        with self._db.transaction() as tx:
            return rollouts.converge_champion(tx)

    def _improve(self) -> int:
        """Start what brings fleets to better variants: a host of a kind that was measured already may have joined."""
        with self._db.read() as tx:
            served = sorted(set(tx.scalars(select(col(Alias.model_id)).where(col(Alias.name) == champion.CHAMPION))))
        started = 0
        for model_id in served:
            with _others_go_on("model", model_id), self._db.transaction() as tx:
                started += rollouts.improve(tx, model_id, self._policies) is not None
        return started


class Control:
    """The loop's body: runs rollout steps that no worker took for `seconds`, so that a roll back waits for nobody."""

    name = "control"

    def __init__(
        self,
        db: Database,
        notifier: Notifier,
        owner: str,
        *,
        policies: Sequence[Policy] = (),
        seconds: float = 2.0,
        lease_seconds: float = 30.0,
    ) -> None:
        self._db, self._notifier, self._owner = db, notifier, owner
        self._policies, self._seconds, self._lease = tuple(policies), seconds, lease_seconds

    def once(self, turning: Turning) -> float:
        for job_id in self._unclaimed():
            turning.beat()
            with _others_go_on("job", job_id):
                self._perform(job_id)
        return self._seconds / 4

    def _unclaimed(self) -> list[int]:
        waited = col(Job.not_before) <= now() - self._seconds, col(Job.created_at) <= now() - self._seconds
        open_steps = (col(Job.queue) == CONTROL, col(Job.state) == JobState.QUEUED, *waited)
        with self._db.read() as tx:
            found = tx.scalars(select(col(Job.id)).where(*open_steps).order_by(col(Job.id)).limit(_BATCH))
            return [job_id for job_id in found if job_id is not None]

    def _perform(self, job_id: int) -> None:
        with self._db.transaction() as tx:
            claim = jobs.claim(tx, job_id, self._owner, self._lease)
        if claim is None:
            return
        log.info("job %d: no worker took this rollout step within %g s; it runs here", job_id, self._seconds)
        try:
            rollout_steps.perform(self._db, self._notifier, claim, self._policies)
        except FencedOut as error:
            log.info("%s", error)
        except stored.BROKEN as error:
            with self._db.transaction() as tx:
                jobs.release(tx, claim, clock(tx) + _PAUSE, f"{type(error).__name__}: {error}")
            raise


class Sequencer:
    """The loop's body: numbers committed events, and rings once more so that watchers read them."""

    name = "sequencer"

    def __init__(self, db: Database, notifier: Notifier, owner: str, *, poll_seconds: float = 0.25) -> None:
        self._db, self._notifier, self._owner, self._poll = db, notifier, owner, poll_seconds

    def once(self, turning: Turning) -> float:
        if events.sequence(self._db, self._owner) == 0:
            return self._poll
        self._notifier.ring("events")
        return 0.0


@contextlib.contextmanager
def _others_go_on(what: str, row_id: int) -> Iterator[None]:
    """What one row does to whoever reads it is said, and costs the others nothing."""
    try:
        yield
    except stored.BROKEN as exc:
        if not stored.is_unreadable(exc):
            raise
        log.warning("%s %d is passed over", what, row_id, exc_info=exc)


def _has_open_job(tx: Session, rollout_id: int) -> bool:
    return bool(jobs.of(tx, "rollout", rollout_id, states=[JobState.QUEUED, JobState.RUNNING]))

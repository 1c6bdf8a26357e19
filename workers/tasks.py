"""The one task body, one breath: claim by id, run the stage, record what came out and what follows, send that.

A message proves nothing: a job that is unknown, done, held by somebody else or not due does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import tenacity

from weighbridge.registry import jobs, variants, versions
from weighbridge.registry.db import Database, Session, clock
from weighbridge.registry.errors import FencedOut, RegistryError, Unavailable
from weighbridge.registry.jobs import Claim
from weighbridge.registry.lifecycle import Stage
from weighbridge.registry.models import Job
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy
from weighbridge.storage.errors import AccessDenied, BucketNotFound, StorageError, StorageFull, StorageUnavailable
from weighbridge.workers import queue, rollout
from weighbridge.workers.heartbeat import Heartbeat
from weighbridge.workers.judges import Unfit
from weighbridge.workers.ours import ChildDied, ChildFailed, OwnFailure, is_ours
from weighbridge.workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

CURABLE = (StorageUnavailable, BucketNotFound, AccessDenied, StorageFull, Unavailable, Unfit)
"""What lies around the job, not in it: it waits, however long, and no attempt is used up."""
_MOST_WAITS = 100
"""Tries after which a job ends that waits for what lies around it, but for a store or a database that is away: with
pauses that grow, most of a working day."""
_AWAY = (StorageUnavailable, BucketNotFound, Unavailable)
_LONGEST_PAUSE = 60.0
_LONGEST_WAIT = 300.0
_LONGEST_ROLLOUT_PAUSE = 5.0
_MAX_ID = 2**31

Recorder = Callable[[Session], None]
"""Writes a stage's findings (artifact, metrics, gates, evidence) and finishes its job, within the given transaction."""


class Stages(Protocol):
    """The stages as this process can run them."""

    def run(self, claim: Claim, heartbeat: Heartbeat) -> Recorder:
        """Run the claim's stage. Raises for what a retry can cure, and FencedOut when the job went elsewhere."""
        ...


@dataclass(frozen=True)
class Worker:
    """Runs jobs by id. Safe to use from several threads if its stages are."""

    db: Database
    notifier: Notifier
    stages: Stages
    settings: WorkerSettings
    owner: str
    """Names the process in leases and events."""
    policies: tuple[Policy, ...] = ()
    sender: queue.Sender | None = field(default=None)
    """Where following jobs are sent at once; None leaves them to the daemon."""
    capable: Mapping[str, Any] | None = None
    """What this worker has, for jobs that need it: {"device", "kind", "memory"}; None takes any job."""

    def run_job(self, job_id: object) -> None:
        """Run one job if it is there to run. Raises nothing that a message could cause."""
        if not isinstance(job_id, int) or isinstance(job_id, bool) or not 0 < job_id < _MAX_ID:
            logger.warning("a message without a job id was dropped")
            return
        try:
            with self.db.transaction() as tx:
                claim = jobs.claim(tx, job_id, self.owner, self.settings.lease_seconds, self.capable)
            if claim is not None:
                self._follow(self._perform(claim))
        except FencedOut as exc:
            logger.info("discarded: %s", exc)
        except Unavailable as exc:
            logger.warning("job %s: %s; it is sent again", job_id, exc)

    def _perform(self, claim: Claim) -> list[Job]:
        try:
            if claim.stage is Stage.ROLLOUT:
                return rollout.perform(self.db, self.notifier, claim, self.policies)
            with Heartbeat(self.db, claim, self.settings.lease_seconds, self.settings.stage_timeout) as heartbeat:
                recorder = self.stages.run(claim, heartbeat)
                return self._record(claim, recorder)
        except FencedOut:
            raise
        except CURABLE as exc:
            return self._record(claim, partial(self._wait, claim=claim, exc=exc))
        except ChildDied as exc:
            logger.warning("job %s ended its child: %s", claim.job_id, exc)
            return self._record(claim, partial(jobs.died, claim=claim, error=str(exc), delay=self._pause(claim)))
        except Exception as exc:
            if is_ours(exc):
                return self._record(claim, partial(self._wait, claim=claim, exc=exc))
            logger.exception(
                "job %s, %s of %s %s, failed", claim.job_id, claim.stage, claim.subject_type, claim.subject_id
            )
            return self._record(claim, partial(self._retry, claim=claim, words=_words(exc)))

    def _record(self, claim: Claim, recorder: Recorder) -> list[Job]:
        """Findings, job and what follows from it in one transaction, tried again while the lease may last."""
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(0.1, max=2.0),
            stop=tenacity.stop_after_delay(self.settings.lease_seconds),
            reraise=True,
        ):
            with attempt, self.db.transaction() as tx:
                recorder(tx)
                return self._advance(tx, claim)
        raise AssertionError("tenacity ends by returning or raising")

    def _advance(self, tx: Session, claim: Claim) -> list[Job]:
        """Draw what follows for the job's subject."""
        actor = f"job:{claim.job_id}"
        if claim.subject_type == "version":
            return versions.advance(tx, claim.subject_id, actor=actor, policies=self.policies)
        if claim.subject_type == "variant":
            return variants.advance(tx, claim.subject_id, actor=actor, policies=self.policies)
        return []

    def _wait(self, tx: Session, claim: Claim, exc: Exception) -> None:
        """What is away comes back; what is full, forbidden or broken somebody must mend, and is not asked for ever."""
        away = isinstance(exc, _AWAY)
        if claim.attempt >= _MOST_WAITS and not away and claim.stage is not Stage.ROLLOUT:
            jobs.set_aside(tx, claim, f"gave up after {claim.attempt} tries: {_words(exc)}")
            return
        logger.warning("job %s waits: %s", claim.job_id, exc)
        said = f"waits: {_words(exc)}"
        if claim.subject_type == "version":
            versions.waits(tx, claim.subject_id, said)
        jobs.release(tx, claim, clock(tx) + self._pause(claim, _LONGEST_PAUSE if away else _LONGEST_WAIT), said)

    def _retry(self, tx: Session, claim: Claim, words: str) -> None:
        """A version whose attempts are used up waits for a person; a rollout never loses its next step."""
        if claim.stage is Stage.ROLLOUT:
            jobs.release(tx, claim, clock(tx) + self._pause(claim), words)
        else:
            jobs.retry(tx, claim, words, self._pause(claim))

    def _pause(self, claim: Claim, longest: float = _LONGEST_PAUSE) -> float:
        """Doubled with each attempt; short for a rollout, whose hosts may stand between two versions."""
        first = self.settings.retry_seconds
        if claim.stage is Stage.ROLLOUT:
            first, longest = min(first, 1.0), _LONGEST_ROLLOUT_PAUSE
        return float(min(first * 2 ** min(claim.attempt - 1, 16), longest))

    def _follow(self, following: list[Job]) -> None:
        """Send first, ring then: the daemon finds them sent."""
        if self.sender is not None and following:
            queue.send(self.db, self.sender, following)
        for topic in ("jobs", "events", "hosts"):
            self.notifier.ring(topic)


def _words(exc: Exception) -> str:
    """What a row says of an error: ours are sentences, others need their name."""
    own = isinstance(exc, StorageError | RegistryError | ChildFailed | OwnFailure)
    return str(exc) if own else f"{type(exc).__name__}: {exc}"

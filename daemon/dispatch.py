"""Hands due jobs to the broker, a bounded number of each queue at a time."""

from __future__ import annotations

from weighbridge.daemon.loops import Turning
from weighbridge.registry import jobs
from weighbridge.registry.db import Database
from weighbridge.registry.models import Job
from weighbridge.workers.queue import Sender

_AWAY_SECONDS = 1.0
"""Pause after the broker took nothing."""


class Dispatch:
    """The loop's body: sends what is queued, due, and not sent or sent too long ago.

    At most `in_flight` jobs of a queue are sent and not claimed, so that a re-sent message is the exception, and a
    broker that comes back empty has lost little.
    """

    name = "dispatch"

    def __init__(
        self,
        db: Database,
        sender: Sender,
        *,
        in_flight: int = 64,
        resend_seconds: float = 60.0,
        poll_seconds: float = 0.25,
    ) -> None:
        self._db, self._sender = db, sender
        self._in_flight, self._resend, self._poll = in_flight, resend_seconds, poll_seconds

    def once(self, turning: Turning) -> float:
        """Send what there is room for; return the seconds until the next poll."""
        marked = self._mark()
        if not marked:
            return self._poll
        taken = set(self._sender.publish(marked))
        if left := [job.id for job in marked if job.id is not None and job.id not in taken]:
            with self._db.transaction() as tx:
                jobs.mark_unsent(tx, left)
            return _AWAY_SECONDS
        return 0.0

    def _mark(self) -> list[Job]:
        """Mark before sending: a job claimed and released before its mark would count as sent when it is due again.

        A daemon that dies in between costs these jobs `resend_seconds`.
        """
        marked: list[Job] = []
        with self._db.transaction() as tx:
            for queue in jobs.queues_due(tx):
                room = self._in_flight - jobs.in_flight(tx, queue, self._resend)
                if room > 0:
                    marked += jobs.unsent(tx, queue, room, self._resend)
            if marked:
                jobs.mark_sent(tx, [job.id for job in marked if job.id is not None])
        return marked

"""Whether a program that failed on a request fails by itself: it is asked its reference golden's first row again."""

from __future__ import annotations

import time

from weighbridge.engines import golden
from weighbridge.engines.protocols import Session

PACE = 1.0
"""Seconds that a finding stands: a client that sends only what fails must not double what it costs."""


class Witness:
    """Answers for one loaded variant with its golden: the bytes of the file, and rtol, atol and spread."""

    def __init__(self, session: Session, data: bytes, tolerance: tuple[float, float, float]) -> None:
        self._session = session
        self._inputs, self._wanted = golden.first_row(session, data, *tolerance)
        self._asked, self._fails = float("-inf"), False

    def fails(self) -> bool:
        """Whether the failure is the version's own: the golden's row fails or differs too."""
        now = time.monotonic()
        if now - self._asked >= PACE:
            self._asked, self._fails = now, not self._holds()
        return self._fails

    def _holds(self) -> bool:
        try:
            golden.must_match(self._session.infer(self._inputs), self._wanted)
        except Exception:  # whatever it raises on what it once answered
            return False
        return True

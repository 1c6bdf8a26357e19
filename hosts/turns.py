"""Turns of an engine child: a large request advances step by step, and half of the time is for those that wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from weighbridge.hosts import blame, codec
from weighbridge.hosts.errors import DeadlineExceeded
from weighbridge.hosts.frames import Frame, Kind

Answer = tuple[Kind, dict[str, Any], list[bytes | memoryview]]
"""Kind, meta and the body's parts."""
Work = Generator[None, None, Answer]
"""A request on its way to its answer; it yields where others may have their turn."""
_SIGN = 0.2
"""Seconds between two signs of life."""


class _Begun(NamedTuple):
    frame: Frame
    work: Work


class Turns:
    """`write` sends the answer to a frame; `waiting` says whether another frame is there."""

    def __init__(self, write: Callable[[Frame, Answer], None], waiting: Callable[[], bool]) -> None:
        self._write, self._waiting = write, waiting
        self._begun: deque[_Begun] = deque()
        self._rest_until = self._signed = 0.0

    def begin(self, frame: Frame, work: Work) -> None:
        """Take the first step now: what is small is answered by it."""
        if not self._advanced(_Begun(frame, work)):
            self._begun.append(_Begun(frame, work))

    def due(self) -> bool:
        """Whether the next step is: something has begun, and nobody waits or those who do had their share."""
        return bool(self._begun) and (time.monotonic() >= self._rest_until or not self._waiting())

    def step(self) -> None:
        """One step of the one whose turn it is; a request past its deadline is given up: nobody waits for it."""
        began, one = time.monotonic(), self._begun.popleft()
        if began > one.frame.meta["deadline"]:
            one.work.close()
            error = DeadlineExceeded("the deadline passed while the request was computed")
            meta = {"status": error.status, "blame": blame.of(error)}
            self._write(one.frame, (Kind.REPLY, meta, [codec.encode_error(str(error))]))
            return
        if not self._advanced(one):
            self._begun.append(one)
        now = time.monotonic()
        self._rest_until = now + (now - began)
        if now - self._signed >= _SIGN:
            self._signed = now
            self._write(one.frame, (Kind.PROGRESS, {}, []))

    def _advanced(self, one: _Begun) -> bool:
        """Whether that step was the last; then it is answered."""
        try:
            next(one.work)
        except StopIteration as end:
            self._write(one.frame, end.value)
            return True
        return False

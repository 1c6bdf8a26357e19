"""The line before an engine child: a few requests are with the child, the others wait here, where one can be dropped.

The child reads its socket in order, so what was sent is computed, whoever has left since. Enough are sent ahead that
it never waits for the next one. Large requests, which it computes in turns with others, have a lane of their own: they
keep no small one waiting here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from weighbridge.hosts.frames import Frame
from weighbridge.hosts.large_json import LARGE


@dataclass(slots=True)
class Lane:
    """`most` of its requests are with the child at once."""

    most: int
    sent: int = 0
    waiting: deque[Question] = field(default_factory=deque)


class Asked(NamedTuple):
    """One question: when it was asked (monotonic clock), the future of its answer, and the lane that it takes up."""

    sent: float
    future: asyncio.Future[Frame]
    lane: Lane | None = None


class Question(NamedTuple):
    """What is to be sent of an inference request: its frame's id and head, and its body."""

    asked: Asked
    id: int
    head: bytes
    body: bytes | bytearray


class Line:
    """Two lanes. `ahead`: how many requests of each the child may have."""

    def __init__(self, ahead: int) -> None:
        self._small, self._large = Lane(ahead), Lane(ahead)

    def lane(self, size: int) -> Lane:
        """Where a body of `size` bytes waits."""
        return self._large if size >= LARGE else self._small

    @property
    def waiting(self) -> int:
        return len(self._small.waiting) + len(self._large.waiting)

    def leave(self, asked: Asked) -> bool:
        """Take a request out; False where the child has it."""
        lane = asked.lane
        for question in lane.waiting if lane is not None else ():
            if question.asked is asked:
                lane.waiting.remove(question)  # type: ignore[union-attr]
                return True
        return False

    def next(self, lane: Lane) -> Question | None:
        """Whose turn it is to be sent, if anybody's."""
        if not lane.waiting or lane.sent >= lane.most:
            return None
        lane.sent += 1
        return lane.waiting.popleft()

    def everybody(self) -> list[Asked]:
        """Empty the line; who was in it."""
        left = [question.asked for lane in (self._small, self._large) for question in lane.waiting]
        self._small.waiting.clear()
        self._large.waiting.clear()
        return left

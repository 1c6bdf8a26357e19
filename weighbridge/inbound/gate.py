"""Which connections a server holds, and which one makes room when there is one too many. Pure but for the soft limit.

Refusing whoever comes last would let a thousand silent connections lock everybody out. So the one that has let the
server wait longest goes, and a newcomer is refused only where every other connection's request is being answered.
"""

from __future__ import annotations

import resource
from typing import Generic, TypeVar

T = TypeVar("T")

_OTHER_FILES = 128
"""File descriptors that a server needs beside its connections."""


class Gate(Generic[T]):
    """Holds connections by their peer's address. What is `waiting` waits for its client and may be ended."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most, self._most_per_address = most, min(most, most_per_address)
        self._held: dict[T, str] = {}
        self._waiting: dict[str, dict[T, None]] = {}
        """By address, those that wait longest first."""
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, one: T) -> bool:
        return one in self._held

    def held(self) -> tuple[T, ...]:
        return tuple(self._held)

    def in_the_way(self, address: str) -> T | None:
        """Which connection is to end before one from `address` may enter; None where there is room or nothing to end.

        Its own address makes room first: another never loses a connection to one that has its share.
        """
        if self._counts.get(address, 0) >= self._most_per_address:
            return self._longest(address)
        if len(self._held) < self._most:
            return None
        most = max(self._waiting, key=lambda one: self._counts[one], default=None)
        return None if most is None else self._longest(most)

    def enter(self, one: T, address: str) -> bool:
        """Hold it, as one that waits; False where there is no room."""
        if len(self._held) >= self._most or self._counts.get(address, 0) >= self._most_per_address:
            return False
        self._held[one] = address
        self._counts[address] = self._counts.get(address, 0) + 1
        self.wait(one)
        return True

    def wait(self, one: T) -> None:
        """It waits for its client from now on."""
        if (address := self._held.get(one)) is not None:
            queue = self._waiting.setdefault(address, {})
            queue.pop(one, None)
            queue[one] = None

    def work(self, one: T) -> None:
        """It waits for us: it is not ended for another."""
        if (address := self._held.get(one)) is not None and (queue := self._waiting.get(address)) is not None:
            queue.pop(one, None)
            if not queue:
                del self._waiting[address]

    def leave(self, one: T) -> None:
        """Hold it no longer. Twice is no error."""
        self.work(one)
        if (address := self._held.pop(one, None)) is not None:
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]

    def _longest(self, address: str) -> T | None:
        return next(iter(self._waiting.get(address, ())), None)


def that_this_process_can_hold(most: int) -> int:
    """`most` connections, or fewer where the process may not open as many files: accept() would fail for everybody."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft - _OTHER_FILES))

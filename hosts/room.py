"""How many bytes of bodies a host holds: arriving, waiting for a child, being computed; in all, and for one address.

What a body says to be long is reserved before a byte of it is read, what grows is reserved as it grows. Bodies of one
read are not counted: there are no more of them than connections. Where room is short, bodies that stand still make
room first: who holds back a last byte keeps nobody else out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from weighbridge.hosts.errors import Overloaded, TooLarge, TooMuchHeld

UNCOUNTED = 1 << 16
"""Bytes up to which a body is not counted."""
_STANDING_STILL = 1.0
"""Seconds without news of a body after which it makes room for another."""


@dataclass(eq=False, slots=True)
class Share:
    """What one request holds. `give_way` ends its arriving; None: it is here whole, and stays until it is answered."""

    address: str
    size: int = 0
    heard: float = 0.0
    """When the last byte came (monotonic clock)."""
    give_way: Callable[[], None] | None = None


class Room:
    """`most` bytes in all, `most_per_address` for one peer."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most, self._most_per_address = most, min(most, most_per_address)
        self._shares: dict[Share, None] = {}
        self._by_address: dict[str, int] = {}
        self.held = 0

    def take(self, share: Share, size: int) -> None:
        """Let the share hold `size` bytes in all.

        Raises TooMuchHeld (its address), Overloaded (everybody), TooLarge (there is not as much room at all).
        """
        if size > self._most_per_address:
            raise TooLarge(f"a body of {size} bytes is more than one address may hold: {self._most_per_address}")
        more = size - share.size
        while (error := self._short(share.address, more)) is not None:
            still = self._standing_still(share, error)
            if still is None or still.give_way is None:
                raise error
            still.give_way()
            self.give(still)
        self._shares[share] = None
        self._count(share, more)

    def exceed(self, share: Share, size: int) -> None:
        """Count `size` bytes more that are here already: an answer until it is taken."""
        self._shares[share] = None
        self._count(share, size)

    def give(self, share: Share) -> None:
        """It holds nothing any more. Twice is no error."""
        if self._shares.pop(share, share) is None:
            self._count(share, -share.size)

    def check(self) -> None:
        """Raise Overloaded while answers that nobody takes fill all of it."""
        if self.held > self._most:
            raise Overloaded(f"answers and bodies of {self.held} bytes are held already (held_bytes)")

    def _short(self, address: str, more: int) -> Overloaded | TooMuchHeld | None:
        if self.held + more > self._most:
            return Overloaded(f"bodies of {self.held} bytes are held already, of {self._most} (held_bytes)")
        if (own := self._by_address.get(address, 0)) + more > self._most_per_address:
            return TooMuchHeld(
                f"bodies of {own} bytes from {address} are held already: {self._most_per_address} are one address's "
                "share (held_bytes_per_address)"
            )
        return None

    def _standing_still(self, newcomer: Share, error: Overloaded | TooMuchHeld) -> Share | None:
        """Whose last byte came longest ago, and long ago; of the same address where that one's share is used up."""
        since = time.monotonic() - _STANDING_STILL
        candidates = [
            share
            for share in self._shares
            if share is not newcomer
            and share.give_way is not None
            and share.heard < since
            and (share.address == newcomer.address or isinstance(error, Overloaded))
        ]
        return min(candidates, key=lambda share: share.heard, default=None)

    def _count(self, share: Share, more: int) -> None:
        share.size += more
        self.held += more
        left = self._by_address.get(share.address, 0) + more
        if left:
            self._by_address[share.address] = left
        else:
            self._by_address.pop(share.address, None)

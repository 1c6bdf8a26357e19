"""How many calls go on at once, and of whom: no single client takes every turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Final

from weighbridge.registry.errors import Unavailable

_PART: Final = 4
"""One client may have this part of the calls that go on at once."""


class Calls:
    """The calls that go on, by client; those that wait for news are counted apart, and cost no other its turn."""

    def __init__(self, most: int, most_waiting: int) -> None:
        self._most = {False: most, True: most_waiting}
        self._clients: dict[bool, Counter[Hashable]] = {False: Counter(), True: Counter()}

    @contextmanager
    def one(self, client: Hashable, *, waits: bool) -> Iterator[None]:
        """Count a call while the block runs. Raises Unavailable where too many go on."""
        going, most = self._clients[waits], self._most[waits]
        if going.total() >= most or going[client] >= max(most // _PART, 1):
            what = "calls that wait for news" if waits else "calls at once"
            raise Unavailable(f"too many {what}: try again")
        going[client] += 1
        try:
            yield
        finally:
            going[client] -= 1
            if not going[client]:
                del going[client]

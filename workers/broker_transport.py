"""Kombu's transport over Valkey or Redis, as workers use it: it delivers what `workers.messages` lets through.

Here and not in the consumer, because Kombu itself parses an envelope, decompresses its body and files its tag before a
consumer sees it.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel, Transport

from weighbridge.workers.messages import Dropped, Forged, clean


def install() -> None:
    """Use it in this process for every URL of Valkey or Redis, before the first connection.

    By name: for `redis+socket` Kombu takes the transport from the URL, whatever Celery is told.
    """
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{StrictTransport.__name__}"))


class StrictChannel(Channel):
    """Lets go of what is not even JSON: it was taken from its queue already."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (ValueError, RecursionError):
            self.connection.dropped.say("it is no JSON")
            return True


class StrictTransport(Transport):
    Channel = StrictChannel

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.dropped = Dropped()

    def _deliver(self, message: object, queue: str) -> None:
        try:
            known = clean(message)
        except Forged as forged:
            self.dropped.say(str(forged))
            return
        super()._deliver(known, queue)  # type: ignore[no-untyped-call]

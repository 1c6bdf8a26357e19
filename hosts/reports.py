"""What a slot did, in the words of the host protocol."""

from __future__ import annotations

from weighbridge.hosts.blame import Blame
from weighbridge.hosts.statistics import BOUNDS
from weighbridge.hosts.statistics import Interval as Taken
from weighbridge.registry.schemas import Interval


def as_interval(taken: Taken) -> Interval:
    """The interval as it is reported."""
    bounds = (*(f"{bound:.9g}" for bound in BOUNDS), "+Inf")
    return Interval(
        id=taken.id,
        seconds=taken.seconds,
        requests=taken.requests,
        errors=taken.blamed.get(Blame.VERSION, 0),
        input_errors=taken.blamed.get(Blame.INPUT, 0),
        refused=taken.blamed.get(Blame.REFUSED, 0),
        latency={bound: count for bound, count in zip(bounds, taken.counts, strict=True) if count},
    )

"""The load of each scenario, inside the measured process: requests one after the other, or at Poisson times.

A session is not thread-safe and a host calls it for one request at a time, so concurrency is waiting calls: with c
callers, c − 1 requests wait while one runs, first come first served. No threads are needed to measure that exactly, and
none disturb it. It is not overlap of requests on a device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from weighbridge.engines.protocols import Arrays
from weighbridge.workers.benchmarking.statistics import is_flat

Infer = Callable[[Arrays], object]

SETTLE, SETTLE_SECONDS = 2, 0.02
"""Requests before each block that do not count: the caches are still another process's. One is enough if it takes as
long as a block."""
WARM_WINDOW = 16
SLICE = 0.0001
"""Seconds of requests whose processor time is read at once: asking the kernel takes half a microsecond. Not longer: the
first request after another process had the processor finds its caches cold, and would be in every slice."""
_SPIN = 0.001
"""Seconds before a scheduled time in which we look at the clock instead of sleeping: a sleep ends late."""


@dataclass(frozen=True)
class Samples:
    """Latencies in the order of the requests, and the time that they took together; seconds."""

    latencies: list[float]
    seconds: float
    busy: list[float] = field(default_factory=list)
    """Closed only: processor seconds of a request, averaged over slices of SLICE seconds. What other processes take
    of the machine is not in it."""
    proven: bool | None = None
    """Server only: whether p99 is within the bound; None: the time ended before either was certain."""


def closed(infer: Infer, pool: Sequence[Arrays], *, seconds: float, least: int, callers: int = 1) -> Samples:
    """`callers` that send their next request when their last is answered, for `seconds` and `least` requests each.

    A request is sent when the previous one of its caller was answered; its latency holds the time that it waited.
    """
    clock, used = time.perf_counter, time.process_time
    _settle(infer, pool)
    latencies: list[float] = []
    busy: list[float] = []
    counted, before = 0, used()
    start = end = sliced = clock()
    sent = deque([start] * callers)
    while end - start < seconds or len(latencies) < least * callers:
        infer(pool[len(latencies) % len(pool)])
        end = clock()
        latencies.append(end - sent.popleft())
        sent.append(end)
        if end - sliced >= SLICE:
            now = used()
            busy.append((now - before) / (len(latencies) - counted))
            counted, before, sliced = len(latencies), now, end
    return Samples(latencies, end - start, busy or [(used() - before) / len(latencies)])


def _settle(infer: Infer, pool: Sequence[Arrays]) -> None:
    start = time.perf_counter()
    for number in range(SETTLE):
        infer(pool[number % len(pool)])
        if time.perf_counter() - start > SETTLE_SECONDS:
            return


def warm(infer: Infer, pool: Sequence[Arrays], *, seconds: float) -> Samples:
    """Run until the rolling median is flat, at most so long; but one request at least."""
    clock = time.perf_counter
    latencies: list[float] = []
    start = end = clock()
    while not latencies or end - start < seconds:
        began = end
        infer(pool[len(latencies) % len(pool)])
        end = clock()
        latencies.append(end - began)
        if len(latencies) % WARM_WINDOW == 0 and is_flat(latencies, WARM_WINDOW):
            break
    return Samples(latencies, end - start)


def server(
    infer: Infer,
    pool: Sequence[Arrays],
    *,
    rate: float,
    bound: float,
    needed: Sequence[int],
    most: int,
    seconds: float,
    seed: int,
) -> Samples:
    """Poisson arrivals at `rate` a second until it is certain whether p99 is within `bound`, by early stopping.

    `needed` is `statistics.queries_needed(most)`. Latency counts from the scheduled time: a server that falls behind
    does not slow its clients down.
    """
    clock = time.perf_counter
    gaps = np.random.default_rng(seed).exponential(1 / rate, most)
    infer(pool[0])
    latencies: list[float] = []
    misses, proven = 0, None
    start = end = clock()
    for number, due in enumerate(start + np.cumsum(gaps)):
        _wait_until(due)
        infer(pool[number % len(pool)])
        end = clock()
        latencies.append(end - due)
        misses += latencies[-1] > bound
        if misses >= len(needed):
            proven = False
        elif len(latencies) >= needed[misses]:
            proven = True
        if proven is not None or end - start > seconds:
            break
    return Samples(latencies, end - start, proven=proven)


def _wait_until(due: float) -> None:
    while (left := due - time.perf_counter()) > 0:
        if left > _SPIN:
            time.sleep(left - _SPIN)

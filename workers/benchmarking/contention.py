"""What else ran on the machine while something was measured: kept beside every round, and said of absolute figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from weighbridge.workers.benchmarking.gpu import Gpu

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_TICKS = 2
"""The kernel counts busy time in ticks (10 ms), what a process used exactly: a difference is off by one at each end."""


@dataclass(frozen=True)
class Limits:
    """A round beyond any of these was measured beside other work. Shares, but for `switches`."""

    others: float = 0.20
    """Of the processors that we may use, taken by other processes. A whole `weighbridge up` at rest takes a twentieth
    of two processors, in bursts; one busy process on four is more than this."""
    steal: float = 0.05
    """Of a processor, taken by the hypervisor: its slices are as long as a request."""
    pressure: float = 0.15
    """Of the time that some runnable task waited for a processor (PSI). Parent and child hand over in turns and never
    compete, so this is others."""
    switches: float = 120.0
    """Involuntary switches of the measured process a second of its processor time. A neighbour on the same processor
    takes it every 3–4 ms, some 250 a second; timers and kernel threads some ten; at the low priority of a worker's
    children, whoever wakes up on an otherwise idle machine some 80."""
    gpu_processes: int = 0
    """Other processes with a context on the device."""
    disturbed: float = 0.25
    """Of the rounds: beyond this the whole measurement was. A median does not feel fewer."""


@dataclass(frozen=True)
class Usage:
    """What the measured processes themselves used: processor seconds, involuntary switches."""

    cpu: float = 0.0
    switches: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.cpu + other.cpu, self.switches + other.switches)


@dataclass(frozen=True)
class Reading:
    """What was seen during one round, in the units of `Limits`; `pressure` None where the kernel does not tell."""

    others: float = 0.0
    steal: float = 0.0
    pressure: float | None = None
    switches: float = 0.0
    gpu_processes: int = 0
    throttled: str = ""
    """Why a GPU's clocks are held down: heat, power brake; empty: they are not."""


def disturbed(seen: Reading, limits: Limits) -> str:
    """What was beyond its limit, in words; empty where nothing was."""
    found = []
    if seen.others > limits.others:
        found.append(f"other processes took {seen.others:.0%} of the processors")
    if seen.steal > limits.steal:
        found.append(f"the hypervisor took {seen.steal:.0%} of a processor")
    if seen.pressure is not None and seen.pressure > limits.pressure:
        found.append(f"tasks waited for a processor {seen.pressure:.0%} of the time")
    if seen.switches > limits.switches:
        found.append(f"{seen.switches:.0f} involuntary switches a second")
    if seen.gpu_processes > limits.gpu_processes:
        found.append(f"{seen.gpu_processes} other processes on the GPU")
    if seen.throttled:
        found.append(f"the GPU's clocks are held down: {seen.throttled}")
    return ", ".join(found)


def taken(readings: Sequence[Reading], limits: Limits) -> str:
    """What took the machine from a measurement of rounds, as the usual disturbed one had it; empty: nothing did."""
    found = [reading for reading in readings if disturbed(reading, limits)]
    if len(found) <= limits.disturbed * len(readings):
        return ""
    middle = {item.name: _middle([getattr(one, item.name) for one in found]) for item in fields(Reading)}
    return disturbed(Reading(**middle), limits) or disturbed(found[len(found) // 2], limits)


def _middle(values: list[Any]) -> Any:
    """The median of those that are there; of words the most frequent."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], str):
        return max(set(known), key=lambda word: (known.count(word), word))
    return sorted(known)[len(known) // 2]


def worst(readings: Sequence[Reading]) -> dict[str, object]:
    """The largest of each, for the record."""
    if not readings:
        return {}
    rows = [asdict(reading) for reading in readings]
    return {name: max((row[name] for row in rows if row[name] is not None), default=None) for name in rows[0]}


@dataclass(frozen=True)
class Counters:
    """The kernel's running sums over the processors that we may use, in seconds."""

    at: float
    busy: float
    steal: float
    own: float
    """This process's, which only waits and adds up."""
    pressure: float | None


def look(proc: Path = Path("/proc")) -> Counters:
    """Read the counters. `busy` holds neither idle, iowait nor steal; guests are in user already."""
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks, busy, steal = _TICKS_A_SECOND, 0, 0
    for line in (proc / "stat").read_text().splitlines():
        name, *values = line.split()
        if name in allowed:
            user, nice, system, _, _, irq, soft, stolen = (int(value) for value in values[:8])
            busy, steal = busy + user + nice + system + irq + soft, steal + stolen
    return Counters(time.monotonic(), busy / ticks, steal / ticks, time.process_time(), _pressure(proc))


def _pressure(proc: Path) -> float | None:
    """Seconds that some task waited for a processor; kernels without PSI have no such file, or refuse to read it."""
    with suppress(OSError, StopIteration, ValueError):
        some = next(line for line in (proc / "pressure/cpu").read_text().splitlines() if line.startswith("some"))
        return int(some.rpartition("total=")[2]) / 1e6
    return None


def between(before: Counters, after: Counters, own: Usage, processors: int) -> Reading:
    """What happened from one look to the next, less what the measured processes did themselves."""
    seconds = max(after.at - before.at, 1e-9)
    others = after.busy - before.busy - own.cpu - (after.own - before.own) - _TICKS / _TICKS_A_SECOND
    waited = None
    if before.pressure is not None and after.pressure is not None:
        waited = min(1.0, (after.pressure - before.pressure) / seconds)
    return Reading(
        others=max(0.0, others / seconds / processors),
        steal=(after.steal - before.steal) / seconds,
        pressure=waited,
        switches=own.switches / max(own.cpu, seconds / 4),  # a process that mostly waits gives no rate to speak of
    )


class Watch:
    """Reads the machine around a round. `reader` and `limits` are there for tests and for other ideas of quiet."""

    def __init__(self, limits: Limits = Limits(), reader: Callable[[], Counters] = look) -> None:
        self.limits, self._reader = limits, reader
        self._processors = len(os.sched_getaffinity(0))
        self._before = reader()

    def start(self) -> None:
        self._before = self._reader()

    def stop(self, own: Usage, gpu: Gpu | None, processes: int) -> Reading:
        """The reading since `start`; `processes` of ours have a context on the GPU, if there is one."""
        seen = between(self._before, self._reader(), own, self._processors)
        if gpu is None:
            return seen
        others = max(0, gpu.processes() - processes)
        return Reading(seen.others, seen.steal, seen.pressure, seen.switches, others, gpu.throttled())

"""What disturbs a benchmark is read from the kernel's own counters, less what the benchmark did itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weighbridge.workers.benchmarking.contention import (
    Counters,
    Limits,
    Reading,
    Usage,
    Watch,
    between,
    disturbed,
    look,
    worst,
)

QUIET = Reading(others=0.02, steal=0.01, pressure=0.05, switches=12)


@pytest.mark.parametrize(
    ("reading", "named"),
    [
        (Reading(others=0.5), "other processes took 50% of the processors"),
        (Reading(steal=0.2), "the hypervisor took 20%"),
        (Reading(pressure=0.4), "waited for a processor 40%"),
        (Reading(switches=250), "250 involuntary switches"),
        (Reading(gpu_processes=1), "1 other processes on the GPU"),
        (Reading(throttled="heat"), "clocks are held down: heat"),
    ],
)
def test_each_disturbance_is_named(reading: Reading, named: str) -> None:
    """The reason says what it was and how much."""
    assert named in disturbed(reading, Limits())
    assert disturbed(QUIET, Limits()) == ""


def test_what_the_measured_processes_do_is_no_disturbance() -> None:
    """A round of one second on two processors: 1.02 s busy, 0.98 of them ours and 0.03 the waiting parent's."""
    before = Counters(at=10, busy=100, steal=1, own=5, pressure=3)
    seen = between(before, Counters(at=11, busy=101.02, steal=1, own=5.03, pressure=3.02), Usage(0.98, 9), 2)
    assert (seen.others, disturbed(seen, Limits())) == (0, "")
    busy = between(before, Counters(at=11, busy=102, steal=1, own=5, pressure=3.9), Usage(0.98, 240), 2)
    assert busy.others == pytest.approx(0.5)
    for word in ("50% of the processors", "90% of the time", "involuntary"):
        assert word in disturbed(busy, Limits())


def test_the_counters_of_this_kernel_are_read(tmp_path: Path) -> None:
    """Only of processors that we may use; without PSI the pressure is unknown, not zero."""
    first = min(os.sched_getaffinity(0))
    (tmp_path / "stat").write_text(f"cpu 0 0 0\ncpu{first} 100 0 50 900 7 1 2 30 0 0\ncpu9999 1 1 1 1 1 1 1 1 0 0\n")
    seen = look(tmp_path)
    ticks = os.sysconf("SC_CLK_TCK")
    assert (seen.busy, seen.steal, seen.pressure) == (153 / ticks, 30 / ticks, None)
    assert look().busy > 0
    assert disturbed(Reading(pressure=None), Limits()) == ""


def test_a_watch_reads_around_a_round() -> None:
    """From `start` to `stop`; the worst of all is kept for the record."""
    times = iter([Counters(0, 0, 0, 0, None), Counters(1, 1, 0, 0, None), Counters(2, 5, 0, 0, None)])
    watch = Watch(reader=lambda: next(times))
    watch.start()
    seen = watch.stop(Usage(0.5, 1), None, 2)
    assert seen.others * len(os.sched_getaffinity(0)) == pytest.approx(3.5, abs=0.1)
    kept = worst([QUIET, seen])
    assert (kept["others"], kept["pressure"]) == (seen.others, 0.05)

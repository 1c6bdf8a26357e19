"""The lease of a machine: jobs beside each other, a benchmark alone, neither starved, and a crash releases it."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from weighbridge.workers.benchmarking.machine import Machine


class Stopped(Exception):
    pass


def stop() -> None:
    """As `waiting`: whoever has to wait stops instead."""
    raise Stopped


def background(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def test_jobs_share_and_a_benchmark_is_alone(machine: Machine) -> None:
    """Whoever has to wait is told so over and over, and can stop waiting: nothing stays held."""
    with machine.working(), machine.working(stop), pytest.raises(Stopped), machine.alone(stop):
        pass
    with machine.alone(stop):
        with pytest.raises(Stopped), machine.working(stop):
            pass
        with pytest.raises(Stopped), machine.alone(stop):
            pass
    with machine.working(stop):
        pass


def test_no_stream_of_jobs_starves_a_benchmark(machine: Machine) -> None:
    """Once it waits, no further job enters; it is next when those inside have left."""
    waits, inside, leave = threading.Event(), threading.Event(), threading.Event()

    def measure() -> None:
        with machine.alone(waits.set):
            inside.set()
            leave.wait(20)

    with machine.working():
        thread = background(measure)
        assert waits.wait(20)
        with pytest.raises(Stopped), machine.working(stop):
            pass
    assert inside.wait(20)
    leave.set()
    thread.join(20)


def test_a_benchmark_gives_way_to_a_job_and_comes_back(machine: Machine) -> None:
    """It sees that a job waits, not that another benchmark does; and it has the machine again when the job has left."""
    waits, ran, both = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with machine.working(waits.set):
            ran.set()

    def measure() -> None:
        with machine.alone(both.set):
            pass

    with machine.alone() as lease:
        assert not lease.wanted()
        other = background(measure)
        assert both.wait(20)
        assert not lease.wanted()
        thread = background(work)
        assert waits.wait(20)
        assert lease.wanted()
        while not ran.is_set():  # the other benchmark may be first
            lease.give_way()
        thread.join(20)
        with pytest.raises(Stopped), machine.working(stop):
            pass
        assert not lease.wanted()
    other.join(20)


def test_a_killed_benchmark_holds_nothing(tmp_path: Path, machine: Machine) -> None:
    """The kernel releases the locks of a process that ends, however it ends."""
    code = (
        "import sys; from pathlib import Path; from weighbridge.workers.benchmarking.machine import Machine\n"
        "with Machine(Path(sys.argv[1])).alone():\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "machine")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Stopped), machine.working(stop):
            pass
        process.kill()
        process.wait()
    with machine.working(stop):
        pass


def test_every_user_of_the_machine_can_lock(tmp_path: Path, machine: Machine) -> None:
    """The folder is everybody's; a file of somebody else need not be writable to be locked."""
    with machine.working():
        assert stat.S_IMODE((tmp_path / "machine").stat().st_mode) == 0o1777
    for file in (tmp_path / "machine").iterdir():
        file.chmod(0o444)
    with machine.alone(stop):
        pass

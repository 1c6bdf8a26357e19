"""The lease of a machine: jobs beside each other, a benchmark alone, neither starved, and a crash releases it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from fixtures.house import House

from weighbridge.settings import Settings
from weighbridge.workers.benchmarking.machine import Machine, own_folder


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


def test_the_locks_are_nobody_elses(tmp_path: Path, machine: Machine) -> None:
    """Only its user enters the folder; a file in it need not be writable to be locked."""
    with machine.working():
        assert stat.S_IMODE((tmp_path / "machine").stat().st_mode) == 0o700
    for file in (tmp_path / "machine").iterdir():
        file.chmod(0o400)
    with machine.alone(stop):
        pass


def _file(place: Path) -> None:
    place.write_text("in the way")


def _link(place: Path) -> None:
    place.symlink_to(place.parent)


def _open_to_all(place: Path) -> None:
    place.mkdir()
    place.chmod(0o1777)


@pytest.mark.parametrize("squat", [_file, _link, _open_to_all])
def test_a_folder_that_others_hold_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squat: Callable[[Path], None]
) -> None:
    """A good checkpoint was quarantined by a file in the place of the locks: now its job waits, and says for what."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    squat(tmp_path / "run" / "weighbridge-machine")
    with ExitStack() as parts:
        house = House(tmp_path / "house", parts)
        house.publish("monday", {"w": np.ones(4, np.float32)})
        house.settle()
        version = house.version()
        assert version.status == "discovered"
        (job,) = version.jobs
        assert (job.state, job.attempt) == ("queued", 1)
        assert job.reason.startswith("waits: worker.machine: ")


def test_each_user_has_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In XDG_RUNTIME_DIR; where there is none, or no whole path, in the data folder, else under their number."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert own_folder() == Path("/run/user/7/weighbridge-machine")
    assert Settings(data=tmp_path).worker_settings.machine == own_folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run/user/7")
    assert Settings(data=tmp_path).worker_settings.machine == tmp_path / "machine"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert own_folder().name == f"weighbridge-machine-{os.getuid()}"
    assert Settings(data=tmp_path).worker_settings.machine == tmp_path / "machine"

"""The parts of `up` that need no processes of Weighbridge: ports, the written settings, a supervised child."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.worker import runs
from pydantic import SecretStr

from weighbridge.daemon import systemd, toml
from weighbridge.daemon.ports import Ports
from weighbridge.daemon.process import RESTART_FIRST, RESTART_MAX, SETTLED, Child
from weighbridge.daemon.up import artifacts_of
from weighbridge.registry.recipe import Gate, Policy
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.settings import StorageSettings


def await_(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until it holds; for what only the kernel knows."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.005)


def test_a_busy_port_is_replaced_by_a_free_one_which_is_kept(tmp_path: Path) -> None:
    """The next start takes the remembered one, though the wished one is free again."""
    file = tmp_path / "ports.json"
    with socket.create_server(("127.0.0.1", 0)) as other:
        wished = other.getsockname()[1]
        found = Ports(file).choose("registry", wished)
        assert found != wished
    assert Ports(file).choose("registry", wished) == found


def test_two_servers_of_one_start_never_share_a_port(tmp_path: Path) -> None:
    """Though none of them listens yet."""
    ports = Ports(tmp_path / "ports.json", patience=0)
    assert len({ports.choose(name, 0) for name in "abcde"} | {ports.choose("f", ports.choose("a", 0))}) == 6


def test_two_that_start_at_once_never_choose_one_port(tmp_path: Path) -> None:
    """Neither listens yet: what the first chose is the second's no more, until the first is gone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        wished = free.getsockname()[1]
    code = f"from weighbridge.daemon.ports import Ports; from pathlib import Path; p = Path({str(tmp_path)!r}); "
    code += f"print(Ports(p / 'b', patience=0, shared=p / 'state' / 'lock').choose('registry', {wished}), flush=True); "
    code += "input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert int(first.stdout.readline()) == wished
        ports = Ports(tmp_path / "a", patience=0, shared=tmp_path / "state" / "lock")
        assert ports.choose("registry", wished) != wished
        first.kill()
    assert ports.choose("host-1", wished) == wished


def test_a_damaged_memory_is_no_obstacle(tmp_path: Path) -> None:
    """It is only a convenience."""
    for text in ("", "[]", '{"registry": "x", "host-0": 70000}', "{"):
        (tmp_path / "ports.json").write_text(text)
        assert Ports(tmp_path / "ports.json").choose("registry", 0) > 0


def test_settings_are_written_as_toml_that_reads_the_same() -> None:
    """Secrets, paths, quotes, control characters, nested groups, lists of tables; None is left out."""
    values = {
        "data": Path("/a b/ü"),
        "broker": {"url": SecretStr('redis://:p"w\\@h'), "none": None},
        "host": {"labels": {"a key": "1", "b": "x\x7f\n\t\u2028"}, "factories": ("a.b:*",), "threads": 1},
        "policies": (Policy(model="m", gates=(Gate(metric="accuracy", min=0.5),)),),
        "flags": [True, 1.5, 1e-07, -3],
    }
    read = tomllib.loads(toml.dumps(values))
    assert read["data"] == "/a b/ü"
    assert read["broker"] == {"url": 'redis://:p"w\\@h'}
    assert read["host"] == {"labels": {"a key": "1", "b": "x\x7f\n\t\u2028"}, "factories": ["a.b:*"], "threads": 1}
    assert Policy.model_validate(read["policies"][0]) == values["policies"][0]  # type: ignore[index]
    assert read["flags"] == [True, 1.5, 1e-07, -3]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def child(tmp_path: Path, code: str, clock: Callable[[], float] = time.monotonic) -> Child:
    return Child("part", [sys.executable, "-S", "-c", code], tmp_path / "part.log", clock=clock)


def test_a_child_that_dies_is_started_again_with_growing_pauses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each death is told with the end of its log; one that lived long starts with the first pause again."""
    clock, pauses = Clock(), []
    part = child(tmp_path, "print('the last words', flush=True); raise SystemExit(3)", clock)
    for _ in range(7):
        part.start()
        await_(lambda: not part.running)
        again = part.keep()
        assert again is not None
        pauses.append(again - clock.now)
        clock.now = again
    assert pauses == [RESTART_FIRST, 1, 2, 4, 8, RESTART_MAX, RESTART_MAX]
    assert "exit status 3" in caplog.text
    assert "the last words" in caplog.text
    part.start()
    clock.now += SETTLED
    await_(lambda: not part.running)
    assert part.keep() == clock.now + RESTART_FIRST


def test_what_a_dead_child_left_behind_is_killed(tmp_path: Path) -> None:
    """Its whole group: nothing of it holds a port or a file when it starts again."""
    code = "import os, time\nif (pid := os.fork()): print(pid, flush=True); os._exit(1)\ntime.sleep(60)"
    part = child(tmp_path, code)
    part.start()
    await_(lambda: not part.running and part.log_file.read_text().strip().isdigit())
    orphan = int(part.log_file.read_text())
    part.keep()
    await_(lambda: not runs(orphan))


def test_a_child_that_does_not_end_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After its time; it is said."""
    part = child(tmp_path, "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()")
    part.start()
    await_(lambda: part.log_file.read_text() == "1\n")
    part.ask_to_end()
    part.end(time.monotonic() + 0.1)
    assert not part.running
    assert "killed" in caplog.text


def test_no_child_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """Even by SIGKILL: the kernel ends them."""
    code = (
        "import sys, time; from pathlib import Path; from weighbridge.daemon.process import Child\n"
        f"c = Child('part', ['sleep', '60'], Path({str(tmp_path / 'part.log')!r})); c.start()\n"
        "print(c.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert runs(pid)
        supervisor.send_signal(signal.SIGKILL)
    await_(lambda: not runs(pid))


def test_systemd_is_told_where_it_listens(socket_folder: Path) -> None:
    """Nobody listens: nothing happens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(socket_folder / "notify"))
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": str(socket_folder / "notify")})
        assert ear.recv(64) == b"READY=1"
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": str(socket_folder / "notify")})
    assert not systemd.notify("READY=1", {})


def test_a_watchdog_is_meant_for_one_process() -> None:
    """Microseconds, and only for the process that systemd names."""
    assert systemd.watchdog_seconds({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}) == 2.0
    assert systemd.watchdog_seconds({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}) is None
    assert systemd.watchdog_seconds({}) is None


def test_artifacts_of_up_lie_in_its_data_folder(tmp_path: Path) -> None:
    """Nobody else may look into it; and whoever writes the drop folder cannot make a new site use theirs."""
    drops, data = tmp_path / "drops", tmp_path / "data"
    (drops / ".weighbridge" / "blobs").mkdir(parents=True)
    data.mkdir()
    chosen = artifacts_of(StorageSettings(url=str(drops)), str(drops), data)
    assert chosen == {"artifacts": str(data / "artifacts"), "artifacts_prefix": ""}
    assert (data / "artifacts").stat().st_mode & 0o777 == 0o700
    (data / "weighbridge.toml").touch()
    assert artifacts_of(StorageSettings(url=str(drops)), str(drops), data) == chosen


def test_a_site_from_before_goes_on_where_its_artifacts_are(tmp_path: Path) -> None:
    """Until its operator moves them, which is one `mv` and a start; what is asked for in words is done in any case."""
    drops, data = tmp_path / "drops", tmp_path / "data"
    blobs = Blobs(FolderStore(drops, create=True), ".weighbridge")
    kept = blobs.put_bytes(b"an artifact")
    data.mkdir()
    (data / "weighbridge.toml").touch()
    settings = StorageSettings(url=str(drops))
    assert artifacts_of(settings, str(drops), data) == {}
    assert settings.exposed is not None
    assert artifacts_of(StorageSettings(url="s3://b"), "s3://b", data) == {}
    asked = settings.model_copy(update={"artifacts": str(tmp_path / "own")})
    assert artifacts_of(asked, str(drops), data) == {}
    (drops / ".weighbridge").rename(data / "artifacts")
    moved = settings.model_copy(update=artifacts_of(settings, str(drops), data))
    assert Blobs(moved.open_artifacts(), moved.artifacts_prefix).get(kept.digest) == b"an artifact"
    assert moved.exposed is None

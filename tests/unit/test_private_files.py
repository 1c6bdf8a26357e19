"""The database, logs, what the broker appends, ports and settings are this user's alone, whatever the umask, and also
where an earlier release left them open."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from weighbridge.daemon.ports import Ports
from weighbridge.registry.db import Database
from weighbridge.storage import private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("there", [False, True], ids=["new", "there and open"])
def test_a_database_is_its_users_alone(tmp_path: Path, *, there: bool) -> None:
    """Its file, and what SQLite puts beside it, while it is open."""
    file = tmp_path / "weighbridge.db"
    if there:
        old = Database(f"sqlite:///{file}")
        old.upgrade()
        for part in tmp_path.iterdir():
            part.chmod(0o666)
    database = Database(f"sqlite:///{file}")
    database.upgrade()
    with database.read():
        assert {part.name: mode(part) for part in tmp_path.iterdir()} == {
            "weighbridge.db": 0o600,
            "weighbridge.db-wal": 0o600,
            "weighbridge.db-shm": 0o600,
        }
    database.close()


@pytest.mark.usefixtures("umask")
def test_ports_are_remembered_in_a_file_of_its_user(tmp_path: Path) -> None:
    """Also where the file was open to others before."""
    file = tmp_path / "ports.json"
    file.write_text("{}")
    file.chmod(0o666)
    Ports(file).choose("registry", 0, "127.0.0.1")
    assert mode(file) == 0o600


def test_what_was_left_open_is_closed_and_no_link_is_followed(tmp_path: Path) -> None:
    """Folders and files within; what a link leads to stays as it is."""
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o644)
    logs = tmp_path / "data" / "logs"
    logs.mkdir(parents=True)
    (logs / "daemon.log").write_text("x")
    (logs / "run").write_text("x")
    (logs / "link").symlink_to(outside)
    for path, bits in ((logs, 0o755), (logs / "daemon.log", 0o664), (logs / "run", 0o755)):
        path.chmod(bits)
    private.close_all(logs)
    private.close_all(tmp_path / "nothing")
    assert [mode(path) for path in (logs, logs / "daemon.log", logs / "run")] == [0o700, 0o600, 0o700]
    assert mode(outside) == 0o644

"""Where the broker's unix socket lies: short, plain, and nobody else's, wherever the data folder is."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.broker import short_folder

from weighbridge.daemon import sockets
from weighbridge.registry.errors import Invalid


@pytest.fixture
def here(socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine whose folder for temporary files is this short one."""
    monkeypatch.setattr(tempfile, "tempdir", str(socket_folder))
    old = os.umask(0o027)
    yield socket_folder
    os.umask(old)


def test_a_short_data_folder_holds_its_own_socket(here: Path) -> None:
    """Where people look for it."""
    assert sockets.socket_path(here) == here / "valkey" / "valkey.sock"


@pytest.mark.parametrize("name", ["d" * 120, "with blanks", "naïve", "a?b", "\udcff"])
def test_any_other_data_folder_has_one_in_a_private_folder(here: Path, name: str) -> None:
    """Too long for a socket or not plain enough for a URL: the same at each start, another for another folder."""
    path = sockets.socket_path(here / name, {})
    assert path.parent == here / f"weighbridge-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sockets.socket_path(here / name, {}) == path
    assert sockets.socket_path(here / f"{name}2", {}) != path
    with socket.socket(socket.AF_UNIX) as ear:
        ear.bind(str(path))


def test_the_users_runtime_folder_comes_first(here: Path) -> None:
    """XDG_RUNTIME_DIR, unless its path is too long as well."""
    (here / "run").mkdir()
    assert sockets.private_folder({"XDG_RUNTIME_DIR": str(here / "run")}).parent == here / "run"
    for useless in ("relative", str(here / ("r" * 90)), str(here / "missing")):
        assert sockets.private_folder({"XDG_RUNTIME_DIR": useless}).parent == here


def test_a_folder_that_others_may_open_is_not_used(here: Path) -> None:
    """Nor a link: somebody could have put it there before us."""
    (here / "run").mkdir()
    mine = here / f"weighbridge-{os.getuid()}"
    mine.mkdir(mode=0o750)
    found = sockets.private_folder({"XDG_RUNTIME_DIR": str(here / "run")})
    assert found.parent == here / "run"
    mine.rmdir()
    mine.symlink_to(found)
    assert sockets.private_folder({}).parent not in (here, here / "run")


def test_no_folder_at_all_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to set."""
    monkeypatch.setattr(sockets, "fits", lambda path: False)
    with pytest.raises(Invalid, match=r"XDG_RUNTIME_DIR .* or broker\.url"):
        sockets.socket_path(here)


def test_the_tests_own_folder_is_short() -> None:
    """Wherever TMPDIR points."""
    folder = short_folder()
    assert sockets.fits(folder / "valkey.sock")
    folder.rmdir()

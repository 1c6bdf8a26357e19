"""A folder with everything in it that people and programs leave in folders."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from fixtures.odd_files import as_nobody, deep_folders

from weighbridge.storage import walk
from weighbridge.storage.errors import AccessDenied
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.pins import disk_stamp
from weighbridge.storage.protocols import ObjectInfo, PassedOver


def surveyed(root: Path, prefix: str = "") -> dict[str, str]:
    """Key → why it was passed over; empty for objects."""
    return {one.key: getattr(one, "reason", "") for one in FolderStore(root).survey(prefix)}


def test_an_unreadable_folder_ends_no_listing(open_folder: Path) -> None:
    """It is passed over with its reason; what lies around it is listed. A plain list is whole or an error."""
    for name in ("a/x", "lost+found/x", "m/run/sub/x", "z/x"):
        (open_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (open_folder / name).write_text("1")
    for name in ("lost+found", "m/run/sub"):
        (open_folder / name).chmod(0)

    def look() -> Any:
        found = surveyed(open_folder)
        try:
            keys = [info.key for info in FolderStore(open_folder).list()]
        except AccessDenied as error:
            return found, error.key
        return found, keys

    found, listed = as_nobody(look)
    assert list(found) == ["a/x", "lost+found/", "m/run/sub/", "z/x"]
    assert "Permission denied" in found["lost+found/"]
    assert "let the daemon's user read it" in found["m/run/sub/"]
    assert listed == "lost+found/"


def test_a_root_that_cannot_be_read_is_no_empty_store(open_folder: Path) -> None:
    """That is the whole store's error."""
    (open_folder / "drops").mkdir(mode=0)

    def look() -> str:
        try:
            return str(surveyed(open_folder / "drops"))
        except AccessDenied as error:
            return f"denied {error.key}"

    assert as_nobody(look) == "denied None"


@pytest.mark.parametrize("seconds", [9e11, 1e15, -1e14, -6.3e10, 2.6e11])
def test_a_date_that_no_calendar_has_is_no_crash(tmp_path: Path, seconds: float) -> None:
    """The date of the last change stands in; the pin still tells every change."""
    file = Path("/dev/shm") / f"wb-date-{os.getpid()}-{seconds:g}"  # a file system that keeps such dates
    try:
        file.write_text("1")
        os.utime(file, (seconds, seconds))
        if abs(file.stat().st_mtime - seconds) > 1:
            pytest.skip("this file system has no such dates")
        info = walk.describe("x", file.stat())
        assert info.modified.timestamp() == pytest.approx(file.stat().st_ctime)
        stamp = disk_stamp(info.etag)
        assert stamp is not None
        assert stamp.modified_ns == file.stat().st_mtime_ns
    finally:
        file.unlink()


def test_folders_a_thousand_deep_end_no_listing(tmp_path: Path) -> None:
    """As deep as checkpoints are, and then the folder is named."""
    (tmp_path / "zeta").mkdir()
    (tmp_path / "zeta/x").write_text("1")
    with deep_folders(tmp_path / "deep"):
        found = surveyed(tmp_path)
        assert found.pop("zeta/x") == ""
        [(key, reason)] = found.items()
        assert key.count("/") == walk.MAX_DEPTH + 1
        assert f"more than {walk.MAX_DEPTH} folders" in reason
        assert surveyed(tmp_path, key) == {key: reason}, "also when it is asked for itself"


def test_everything_odd_is_named_with_its_reason(tmp_path: Path) -> None:
    """Links out, to nothing and in circles, pipes, sockets, names that no key can be."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "f").write_text("1")
    (root / "m").mkdir()
    (root / "m/real").write_text("1")
    for name, target in (("file", outside / "f"), ("folder", outside), ("gone", "nowhere"), ("circle", "circle"),
                         ("inside", "real")):  # fmt: skip
        (root / "m" / name).symlink_to(target)
    (root / "latest").symlink_to("m")
    os.mkfifo(root / "m/pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "m/s"))
    (root / "m/back\\slash").write_text("1")
    (root / "m/.weighbridge-123").write_text("1")
    os.mkdir(os.fsencode(root / "m") + b"/\xff")
    found = surveyed(root)
    assert {key for key, reason in found.items() if not reason} == {"m/inside", "m/real"}
    for key, reason in {
        "m/file": "leads out of", "m/folder/": "copy the folder into it", "m/gone": "not there",
        "m/circle": "leads nowhere", "m/pipe": "no regular file", "m/s": "no regular file",
        "m/back\\slash": "backslash", "m/\\udcff/": "not Unicode",
    }.items():  # fmt: skip
        assert reason in found.pop(key), key
    assert set(found) == {"m/inside", "m/real"}, "a link to a folder inside is nothing, and so is our own file"


def test_one_is_found_as_a_listing_tells_it(tmp_path: Path) -> None:
    """The same answer, without reading the folder; behind a link to a folder is nothing."""
    root = tmp_path / "root"
    (root / "m").mkdir(parents=True)
    (root / "m/real").write_text("1")
    (root / "m/out").symlink_to(tmp_path)
    (root / "m/far").symlink_to("/etc/hostname")
    (root / "latest").symlink_to("m")
    store = FolderStore(root)
    listed = {one.key.removesuffix("/"): one for one in store.survey()}
    for key in ("m/real", "m/far", "m/out"):
        assert store.find(key) == listed[key]
    assert store.find("latest/real") is store.find("m") is store.find("m/none") is None
    behind = store.find("m/out/root")
    assert isinstance(behind, PassedOver)
    assert "leads out of" in behind.reason


def test_a_huge_folder_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes whole, in the disk's order; a usual one in the order of its names."""
    for number in range(30):
        (tmp_path / f"{number:02}").write_text("1")
    keys = [one.key for one in FolderStore(tmp_path).survey()]
    assert keys == sorted(keys)
    monkeypatch.setattr(walk, "_SORTED", 10)
    found = list(FolderStore(tmp_path).survey())
    assert sorted(one.key for one in found) == keys
    assert all(isinstance(one, ObjectInfo) for one in found)

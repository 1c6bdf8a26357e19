"""What only a folder has: links, pipes, writers, disks that fill, mount points that go away."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from weighbridge.storage import atomic, lease
from weighbridge.storage.errors import (
    BucketNotFound,
    InvalidKey,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageFull,
)
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.pins import pin


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def store(root: Path) -> FolderStore:
    return FolderStore(root, durable=False)


def keys(store: FolderStore) -> list[str]:
    return [info.key for info in store.list()]


def test_links_within_the_root_are_followed_and_those_that_leave_it_refused(
    store: FolderStore, root: Path, tmp_path: Path
) -> None:
    """A linked file inside is an object; one outside, or behind a linked folder outside, is not, for any verb."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    store.put("blobs/1", b"inside")
    (root / "good").symlink_to("blobs/1")
    (root / "bad").symlink_to(tmp_path / "secret" / "key")
    (root / "out").symlink_to(tmp_path / "secret", target_is_directory=True)
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    assert store.get("good") == b"inside"
    assert keys(store) == ["blobs/1", "good"]
    assert list(store.list("out/")) == list(store.entries("out/")) == []
    for key in ("bad", "out/key", "out/new"):
        for verb in (store.get, store.head, store.open, store.delete, store.has_writer, store.local_path):
            with pytest.raises(InvalidKey, match="symbolic link"):
                verb(key)
        with pytest.raises(InvalidKey):
            store.put(key, b"x")
    assert os.listdir(tmp_path / "secret") == ["key"]


def test_what_is_no_regular_file_is_no_object(store: FolderStore, root: Path) -> None:
    """A pipe neither hangs a reader nor shows in a listing; nor does a folder."""
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    for key in ("pipe", "folder"):
        for verb in (store.get, store.head):
            with pytest.raises(ObjectNotFound, match="no regular file"):
                verb(key)
    assert keys(store) == []


@pytest.mark.parametrize(
    "change",
    [lambda path: path.write_bytes(b"o" * 1_000_001), lambda path: os.truncate(path, 100),
     lambda path: path.write_bytes(b"x" * 1_000_000)],
    ids=["grown", "shrunk", "same size"],
)  # fmt: skip
def test_a_file_written_in_place_while_it_is_read_is_noticed(
    store: FolderStore, root: Path, change: Callable[[Path], object]
) -> None:
    """A stream of a file that changed under it ends in PreconditionFailed, whatever its new size."""
    store.put("a", b"o" * 1_000_000)
    with store.open("a") as stream:
        stream.read(10)
        _until_file_times_tick(root / "a")
        change(root / "a")
        with pytest.raises(PreconditionFailed, match="changed while it was read"):
            stream.read()


def _until_file_times_tick(path: Path) -> None:
    """File times advance by the kernel's tick, a few ms: two changes within one look alike."""
    probe = path.with_name("probe")
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return


def test_a_missing_root_is_not_an_empty_one(store: FolderStore, root: Path) -> None:
    """After the folder went away every verb says so, and a put does not make it anew."""
    info = store.put("a", b"x")
    (root / "a").unlink()
    root.rmdir()
    for verb in (store.check, lambda: list(store.list()), lambda: list(store.entries()), lambda: store.get("a"),
                 lambda: store.head("a"), lambda: store.put("a", b"x"), lambda: store.delete("a"),
                 lambda: store.copy(pin(info), "b")):  # fmt: skip
        with pytest.raises(BucketNotFound, match=str(root)):
            verb()
    assert not root.exists()
    FolderStore(root, create=True).check()


def test_a_full_disk_leaves_the_old_object(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC, here from fsync, becomes StorageFull with advice; the old bytes stay, the temporary file goes."""
    store = FolderStore(root)
    store.put("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(StorageFull, match=r"a: No space left on device; free some space"):
        store.put("a", b"new")
    assert store.get("a") == b"old"
    assert os.listdir(root) == ["a"]


def test_conditional_puts_work_without_renameat2(
    store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel or file system lacks it, a link and an unlink do."""

    class OldLibrary:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

    monkeypatch.setattr(atomic.ctypes, "CDLL", OldLibrary)
    store.put("a", b"first", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put("a", b"second", if_none_match=True)
    assert (store.get("a"), os.listdir(root)) == (b"first", ["a"])


def test_a_conditional_put_keeps_its_etag(store: FolderStore) -> None:
    """A pin made the moment the object appeared holds: nothing touches the file afterwards."""
    info = store.put("a", b"x", if_none_match=True)
    assert store.head("a") == info


def test_a_file_and_a_folder_cannot_have_one_name(store: FolderStore) -> None:
    """Putting below a file, or over a folder, is a clear error."""
    store.put("a", b"x")
    store.put("b/c", b"x")
    for key in ("a/b", "a/b/c", "b"):
        with pytest.raises(StorageError, match=key):
            store.put(key, b"x")
    with pytest.raises(ObjectNotFound):
        store.get("a/b")


def test_a_name_too_long_for_the_disk_is_an_invalid_key(store: FolderStore) -> None:
    """A key may be valid on S3 and not here."""
    with pytest.raises(InvalidKey):
        store.put("x" * 300, b"x")


def test_names_that_are_no_text_are_passed_over(store: FolderStore, root: Path) -> None:
    """A file whose name is not UTF-8 cannot be a key; its neighbours are listed."""
    (root / os.fsdecode(b"\xff.safetensors")).write_bytes(b"x")
    (root / ".weighbridge-left").write_bytes(b"x")
    store.put("good", b"x")
    assert keys(store) == ["good"]


def test_writers_are_seen(store: FolderStore, root: Path) -> None:
    """An open writer is seen, an open reader is none."""
    store.put("a", b"x")
    assert store.has_writer("a") is False
    with (root / "a").open("rb"):
        assert store.has_writer("a") is False
    with (root / "a").open("ab"):
        assert store.has_writer("a") is True
    assert store.has_writer("a") is False


def test_a_writer_that_comes_during_the_look_kills_nobody(
    store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaking our lease signals us: by SIGURG, which is harmless, not by SIGIO, which ends a process."""
    store.put("a", b"x")
    signalled: list[int] = []  # no Event: its lock is not for a handler that interrupts its own waiter
    writer = threading.Thread(target=lambda: (root / "a").write_bytes(b"new"))
    real = fcntl.fcntl

    def slow(descriptor: int, command: int, argument: int) -> int:
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_UNLCK):
            writer.start()
            # In short waits: the kernel may choose another thread, and then nothing interrupts this one's wait.
            assert any(signalled or time.sleep(0.01) for _ in range(1000))
        return real(descriptor, command, argument)

    monkeypatch.setattr(lease.fcntl, "fcntl", slow)
    before = signal.signal(signal.SIGURG, lambda number, _: signalled.append(number))
    try:
        assert store.has_writer("a") is False
    finally:
        signal.signal(signal.SIGURG, before)
        writer.join(10)
    assert store.get("a") == b"new"


@pytest.mark.parametrize("kind", sorted(lease._REMOTE))
def test_on_a_remote_file_system_nobody_can_tell(
    kind: int, store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and SMB refuse a lease as if there were a writer; believed, every file there would wait for ever."""
    store.put("a", b"x")
    monkeypatch.setattr(lease, "_kind", lambda descriptor: kind)
    with (root / "a").open("ab"):
        assert store.has_writer("a") is None


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EREMOTEIO, errno.ENOTTY])
def test_without_leases_nobody_can_tell_and_it_is_said_once(
    code: int, store: FolderStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the kernel answers but EAGAIN says nothing of writers; one warning says what is done instead."""

    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    store.put("a", b"x")
    monkeypatch.setattr(lease.fcntl, "fcntl", refused)
    assert [store.has_writer("a") for _ in range(3)] == [None] * 3
    [said] = [one.getMessage() for one in caplog.records]
    assert "quiet" in said


def test_a_file_system_without_links_or_synced_folders_still_writes_once(
    store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither renameat2, nor hard links, nor fsync of a folder (exFAT, SMB, FUSE): once only all the same."""
    fsync = os.fsync

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no folders here")
        fsync(descriptor)

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", only_files)
    slow = FolderStore(root, durable=True)
    slow.put("a", b"first", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        slow.put("a", b"second", if_none_match=True)
    assert slow.get("a") == b"first"
    assert [path.name for path in root.iterdir()] == ["a"]

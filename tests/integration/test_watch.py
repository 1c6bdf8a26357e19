"""A watched folder: what happens in it is heard of, and what inotify loses is looked for."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.odd_files import as_nobody, deep_folders
from watchdog.observers.inotify_c import InotifyConstants, InotifyEvent, WatchDescriptor

from weighbridge.storage.errors import BucketNotFound, StorageUnavailable
from weighbridge.storage.events import Kind, ObjectEvent
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.watch import FolderWatch


class Heard:
    """A sink that can be waited on."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self._changed = threading.Condition()

    def __call__(self, event: ObjectEvent) -> None:
        with self._changed:
            self.events.append((event.kind, event.key))
            self._changed.notify_all()

    def until(self, done: Callable[[list[tuple[str, str]]], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: done(self.events), 10), self.events

    def wait(self, kind: Kind, key: str) -> None:
        self.until(lambda events: (kind, key) in events)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "watched"
    folder.mkdir()
    return folder


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def watch(root: Path, heard: Heard) -> Iterator[FolderWatch]:
    with FolderWatch(root, heard) as started:
        heard.wait(Kind.RESCAN, "")
        heard.events.clear()
        yield started


@pytest.mark.usefixtures("watch")
def test_files_are_heard_of(root: Path, heard: Heard) -> None:
    """Created, closed, moved and deleted files, in folders that are new too; our temporary files are not."""
    with (root / "a.safetensors").open("wb") as file:
        heard.wait(Kind.CREATED, "a.safetensors")
        heard.events.clear()
        file.write(b"x")
    heard.wait(Kind.CREATED, "a.safetensors")  # closed
    (root / "a.safetensors").rename(root / "b.safetensors")
    heard.wait(Kind.REMOVED, "a.safetensors")
    heard.wait(Kind.CREATED, "b.safetensors")
    (root / "b.safetensors").unlink()
    heard.wait(Kind.REMOVED, "b.safetensors")
    FolderStore(root).put("digits/run-1/model.safetensors", b"x", if_none_match=True)
    heard.until(lambda events: any(key.startswith("digits/") for _, key in events))
    FolderStore(root).put("digits/run-1/späße.json", b"x")
    heard.wait(Kind.CREATED, "digits/run-1/späße.json")
    assert not [key for _, key in heard.events if ".weighbridge-" in key]


@pytest.mark.usefixtures("watch")
def test_a_moved_in_folder_is_rescanned(root: Path, heard: Heard, tmp_path: Path) -> None:
    """Nobody creates or closes the files of a folder that is moved in; renamed and removed folders likewise."""
    (tmp_path / "outside" / "sub").mkdir(parents=True)
    (tmp_path / "outside" / "sub" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "outside").rename(root / "run-1")
    heard.wait(Kind.RESCAN, "run-1/")
    (root / "run-1").rename(root / "run-2")
    heard.until(lambda e: {(Kind.RESCAN, "run-1/"), (Kind.RESCAN, "run-2/")} <= set(e))
    (root / "run-2" / "sub" / "late.json").write_bytes(b"{}")
    heard.wait(Kind.CREATED, "run-2/sub/late.json")
    shutil.rmtree(root / "run-2")
    heard.wait(Kind.REMOVED, "run-2/sub/late.json")


def test_an_overflow_of_the_queue_is_a_rescan(watch: FolderWatch, heard: Heard) -> None:
    """What the kernel dropped is looked for everywhere; the watch goes on.

    The kernel's own event is handed in: filling a real queue needs 16,384 events faster than they are read.
    """
    assert watch._observer is not None
    overflow = InotifyEvent(WatchDescriptor(-1), InotifyConstants.IN_Q_OVERFLOW, 0, b"")
    watch._observer._inotify_fd.handle_event(overflow)
    heard.wait(Kind.RESCAN, "")
    assert watch.alive
    (watch.root / "after.json").write_bytes(b"{}")
    heard.wait(Kind.CREATED, "after.json")


def test_a_folder_that_is_added_twice_does_not_end_the_watch(watch: FolderWatch, heard: Heard) -> None:
    """A folder made while its parent is added is seen twice by watchdog: no warning, which here is an error."""
    assert watch._observer is not None
    (watch.root / "run-1").mkdir()
    heard.wait(Kind.RESCAN, "run-1/")
    reader = watch._observer._inotify_fd
    (id_, callback), *_ = next(iter(reader._watch_for_wd.values())).callbacks.items()
    reader.add_callback(os.fsencode(watch.root / "run-1"), InotifyConstants.IN_CREATE, callback, id_)
    (watch.root / "run-1" / "a.json").write_bytes(b"{}")
    heard.wait(Kind.CREATED, "run-1/a.json")


def test_a_failing_sink_does_not_end_the_watch(root: Path, heard: Heard, caplog: pytest.LogCaptureFixture) -> None:
    """An exception of the sink is logged; later events come."""
    broken = threading.Event()

    def sink(event: ObjectEvent) -> None:
        if event.key == "bad.json":
            broken.set()
            raise RuntimeError("the sink broke")
        heard(event)

    with FolderWatch(root, sink) as watch:
        (root / "bad.json").write_bytes(b"{}")
        assert broken.wait(10)
        (root / "good.json").write_bytes(b"{}")
        heard.wait(Kind.CREATED, "good.json")
        assert watch.alive
    assert "failed for created bad.json" in caplog.text


def test_a_dead_watch_is_noticed_and_started_anew(watch: FolderWatch, heard: Heard) -> None:
    """When the folder goes, the watch is dead and says so; when it is back, all is rescanned."""
    assert watch.ensure() is False
    shutil.rmtree(watch.root)
    assert not watch.alive
    with pytest.raises(BucketNotFound, match=str(watch.root)):
        watch.ensure()
    watch.root.mkdir()
    heard.events.clear()
    assert watch.ensure() is True
    heard.wait(Kind.RESCAN, "")
    (watch.root / "a.json").write_bytes(b"{}")
    heard.wait(Kind.CREATED, "a.json")


def test_a_folder_that_was_swapped_is_noticed(watch: FolderWatch, heard: Heard) -> None:
    """A folder moved away with another put in its place: the new one is watched."""
    watch.root.rename(watch.root.with_name("old"))
    watch.root.mkdir()
    assert not watch.alive
    assert watch.ensure() is True
    (watch.root / "a.json").write_bytes(b"{}")
    heard.wait(Kind.CREATED, "a.json")


def test_a_dead_thread_is_noticed(watch: FolderWatch, heard: Heard) -> None:
    """A watch whose reader thread ended is not alive, though the folder is there."""
    assert watch._observer is not None
    watch._observer._inotify_fd.stop()
    watch._observer._inotify_fd.join(10)
    assert not watch.alive
    assert watch.ensure() is True
    (watch.root / "a.json").write_bytes(b"{}")
    heard.wait(Kind.CREATED, "a.json")


def test_a_folder_that_cannot_be_watched_says_why(root: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of inotify watches: the message names the limits. Without a folder: BucketNotFound."""
    with pytest.raises(BucketNotFound):
        FolderWatch(root / "nope", heard).start()

    def no_watches(*args: object) -> int:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr("watchdog.observers.inotify_c.InotifyFD._get_or_create_watch", no_watches)
    before = threading.active_count()
    with pytest.raises(StorageUnavailable, match="max_user_watches"):
        FolderWatch(root, heard).start()
    assert threading.active_count() == before
    assert os.path.isdir(root)


def inotify_instances() -> int:
    """How many this process has open."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.path.lexists(link) and "inotify" in os.readlink(link) for link in links)


def test_folders_a_thousand_deep_do_not_end_the_watch(watch: FolderWatch, heard: Heard, tmp_path: Path) -> None:
    """Made there, moved in, moved away: the watch goes on, and is the same one."""
    with deep_folders(watch.root / "deep"):
        heard.wait(Kind.RESCAN, "deep/")
        (watch.root / "a.json").write_bytes(b"{}")
        heard.wait(Kind.CREATED, "a.json")
        (watch.root / "deep").rename(tmp_path / "aside")
        heard.events.clear()
        (tmp_path / "aside").rename(watch.root / "deep")
        heard.wait(Kind.RESCAN, "deep/")
        (watch.root / "deep/d/d/late.json").write_bytes(b"{}")
        heard.wait(Kind.CREATED, "deep/d/d/late.json")
        assert watch.ensure() is False, "it lives"


def test_a_watch_starts_beside_folders_a_thousand_deep(root: Path, heard: Heard) -> None:
    """And as often as it is started and stopped, it leaves no inotify instance: a user has 128 of them."""
    before = inotify_instances()
    with deep_folders(root / "deep"):
        for _ in range(5):
            with FolderWatch(root, heard):
                assert inotify_instances() == before + 1
    assert inotify_instances() == before


def test_a_watch_that_died_leaves_no_instance(root: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends its reader, or its start, the next one begins with what there was."""
    before = inotify_instances()
    with FolderWatch(root, heard) as watch:
        with monkeypatch.context() as broken:
            broken.setattr("weighbridge.storage.watch._Folders.on_event", lambda *_: 1 / 0)
            broken.setattr(threading, "excepthook", lambda _: None)
            (root / "a.json").write_bytes(b"{}")
            assert watch._observer is not None
            watch._observer._inotify_fd.join(10)
        assert not watch.alive
        assert watch.ensure() is True
        assert inotify_instances() == before + 1
    monkeypatch.setattr("weighbridge.storage.watch._Folders._add_all_callbacks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FolderWatch(root, heard).start()
    assert inotify_instances() == before


def test_an_unreadable_folder_does_not_end_the_watch(open_folder: Path) -> None:
    """What is in it cannot be watched; all else is."""
    for name in ("a", "lost+found", "z"):
        (open_folder / name).mkdir()
    (open_folder / "lost+found").chmod(0)
    (open_folder / "z").chmod(0o777)

    def hear() -> bool:
        heard = Heard()
        with FolderWatch(open_folder, heard) as watch:
            (open_folder / "z/a.json").write_bytes(b"{}")
            heard.wait(Kind.CREATED, "z/a.json")
            return watch.alive

    assert as_nobody(hear)

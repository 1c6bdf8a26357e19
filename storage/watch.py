"""A folder, watched: inotify through watchdog, with the losses that inotify has made visible.

watchdog walks by recursion, in its reader's thread: a folder in a thousand others ended it. Here it walks by a stack,
and as deep as listings go (storage.walk). What is in a new folder it need not find: the folder's own event is a rescan.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import DEFAULT_OBSERVER_TIMEOUT, BaseObserver
from watchdog.observers.inotify import InotifyEmitter, InotifyObserver, InotifyWatchGroup
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchCallback,
    WatchDescriptor,
)
from watchdog.observers.inotify_move_event_grouper import GroupedInotifyEvent, PathedInotifyEvent

from weighbridge.storage.errors import BucketNotFound, StorageUnavailable
from weighbridge.storage.events import Kind, ObjectEvent, Sink
from weighbridge.storage.keys import is_valid, shown
from weighbridge.storage.walk import MAX_DEPTH

log = logging.getLogger(__name__)

MAX_FOLDERS = 50_000
"""Folders that are watched; what is in more is seen by listings. One costs a kilobyte here and one in the kernel."""

# Opens, reads and single writes say nothing that the close does not say, and are most of the traffic.
_WANTED: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    DirCreatedEvent,
    DirMovedEvent,
    DirDeletedEvent,
]


class FolderWatch:
    """Tells `sink` of every change under `root`, from a thread of its own.

    Starting, a moved-in folder, and an overflow of inotify's queue give a `rescan`. A watch can die (its folder is
    removed, a thread fails): call `ensure` now and then, which starts it anew.
    """

    def __init__(self, root: Path | str, sink: Sink) -> None:
        self.root = Path(os.path.abspath(root))
        self._sink = sink
        self._observer: _Observer | None = None
        self._watched: os.stat_result | None = None

    def start(self) -> FolderWatch:
        """Watch from here on; what is there already is a `rescan`. Raises BucketNotFound, StorageUnavailable."""
        if not self.root.is_dir():
            raise BucketNotFound(f"there is no folder {self.root} to watch")
        watched = self.root.stat()
        try:
            observer = _Observer(lambda: self._tell(Kind.RESCAN, ""))
        except OSError as error:
            raise StorageUnavailable(f"cannot watch {self.root}: {error.strerror}") from error
        try:
            observer.schedule(_Handler(self), str(self.root), recursive=True, event_filter=_WANTED)
            observer.start()
        except BaseException as error:
            observer.stop_reading()  # an instance that is left open is one of few
            if not isinstance(error, OSError):
                raise
            raise StorageUnavailable(
                f"cannot watch {self.root}: {error.strerror}; "
                "inotify's limits are in /proc/sys/fs/inotify (max_user_watches, max_user_instances)"
            ) from error
        self._observer, self._watched = observer, watched
        self._tell(Kind.RESCAN, "")
        return self

    def stop(self) -> None:
        """End the watch; no event comes after this returns."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join()

    @property
    def alive(self) -> bool:
        """Whether events still come."""
        return self._observer is not None and self._observer.is_whole() and self._is_there()

    def ensure(self) -> bool:
        """Start anew if the watch died; return whether it had to. Raises BucketNotFound while there is no folder."""
        if self.alive:
            return False
        log.warning("the watch on %s died: starting it anew", self.root)
        self.stop()
        self.start()
        return True

    def __enter__(self) -> FolderWatch:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def seen(self, kind: Kind, path: str | bytes, *, folder: bool = False) -> None:
        """Tell of a path; those that are no keys (our temporary files, the root) are nobody's business."""
        key = os.path.relpath(os.fsdecode(path), self.root)
        if is_valid(key):
            self._tell(kind, f"{key}/" if folder else key)

    def _is_there(self) -> bool:
        """Whether the path still names the folder that is watched: inotify follows one that was moved away."""
        try:
            return self._watched is not None and os.path.samestat(self._watched, self.root.stat())
        except OSError:
            return False

    def _tell(self, kind: Kind, key: str) -> None:
        try:
            self._sink(ObjectEvent(kind, key, "folder"))
        except Exception:
            # Events are hints: the next listing finds what this one meant. The watch must outlive it.
            log.exception("the sink of the watch on %s failed for %s %s", self.root, kind, key)


class _Handler(FileSystemEventHandler):
    def __init__(self, watch: FolderWatch) -> None:
        self._watch = watch

    def dispatch(self, event: FileSystemEvent) -> None:
        match event:
            case FileCreatedEvent() | FileClosedEvent():
                self._watch.seen(Kind.CREATED, event.src_path)
            case FileDeletedEvent():
                self._watch.seen(Kind.REMOVED, event.src_path)
            case FileMovedEvent():
                self._watch.seen(Kind.REMOVED, event.src_path)
                self._watch.seen(Kind.CREATED, event.dest_path)
            case DirMovedEvent():
                self._watch.seen(Kind.RESCAN, event.src_path, folder=True)
                self._watch.seen(Kind.RESCAN, event.dest_path, folder=True)
            case DirCreatedEvent() | DirDeletedEvent():
                # A folder that is moved in brings files that nobody creates or closes.
                self._watch.seen(Kind.RESCAN, event.src_path, folder=True)


class _Observer(InotifyObserver):
    """watchdog's observer, which also tells when the kernel's queue overflowed: by itself it only logs that."""

    def __init__(self, on_overflow: Callable[[], None]) -> None:
        self._inotify_fd = _NoticingFD(on_overflow)
        self._inotify_fd.start()
        BaseObserver.__init__(self, _Emitter, timeout=DEFAULT_OBSERVER_TIMEOUT, inotify_fd=self._inotify_fd)

    def is_whole(self) -> bool:
        """Whether every thread that an event passes through is alive."""
        threads = [self, self._inotify_fd, *self.emitters]
        return all(thread.is_alive() for thread in threads) and bool(self.emitters)

    def stop_reading(self) -> None:
        """Clean up after a failed start, when there is no thread to stop yet."""
        self._inotify_fd.stop()
        self._inotify_fd.join()


class _Emitter(InotifyEmitter):
    """Tells of a folder that moved, and not of all that is in it: whoever hears of it lists it."""

    def on_thread_start(self) -> None:
        mask = self.get_event_mask_from_filter()
        self._inotify = _Folders(self._inotify_fd, os.fsencode(self.watch.path), is_recursive=True, event_mask=mask)

    def build_and_queue_event(self, event: GroupedInotifyEvent, *, full_events: bool = False) -> None:
        if not isinstance(event, PathedInotifyEvent):
            source, target = event
            if source.ev.is_directory:
                self.queue_event(DirMovedEvent(os.fsdecode(source.path), os.fsdecode(target.path)))
                return
        elif event.ev.is_moved_to and event.ev.is_directory:
            self.queue_event(DirCreatedEvent(os.fsdecode(event.path)))
            return
        super().build_and_queue_event(event, full_events=full_events)


class _Folders(InotifyWatchGroup):
    """The watched folders of one root."""

    def _add_all_callbacks(self, path: bytes) -> None:
        self._add_callback(path)
        folders, top = [path], self.path.count(b"/")
        while folders:
            below = _folders_in(folders.pop())
            if not below or below[0].count(b"/") - top > MAX_DEPTH:
                continue
            for folder in below:
                self._add_callback(folder)
            folders += below

    def _recursive_simulate(self, src_path: bytes) -> list[InotifyEvent]:
        return []


def _folders_in(folder: bytes) -> list[bytes]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []  # gone, unreadable, or no folder: the listing says so


class _NoticingFD(InotifyFD):
    def __init__(self, on_overflow: Callable[[], None]) -> None:
        super().__init__()
        self._on_overflow, self._full = on_overflow, False

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._is_reading = False  # If this thread died, whoever stops it closes the descriptors.

    def add_callback(self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId) -> WatchDescriptor:
        """Watch one folder; a second time for the same one is fine.

        A folder made while its parent is being added is added twice, rightly. watchdog warns of that at length, and
        where warnings are errors its reader dies of it. It also passes over folders that it cannot watch, silently.
        """
        try:
            with self._lock:
                if len(self._watch_for_wd) >= MAX_FOLDERS:
                    raise OSError(errno.ENOSPC, f"more than {MAX_FOLDERS:,} folders")
                watch = self._get_or_create_watch(path, mask)
                if watch.wd < 0:  # watchdog takes a refusal (EACCES) for a watch
                    self._watch_for_wd.pop(watch.wd, None)
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                watch.callbacks[id_] = callback
                return watch.wd
        except OSError as error:
            if error.errno == errno.ENOSPC and not self._full:
                self._full = True
                log.warning(
                    "cannot watch %s: %s; only listings see what is in it", shown(os.fsdecode(path)), error.strerror
                )
            raise

    def handle_event(self, event: InotifyEvent) -> None:
        super().handle_event(event)
        if event.is_queue_overflow:
            self._on_overflow()

"""Keeps the watch on a local folder alive."""

from __future__ import annotations

from pathlib import Path

from weighbridge.daemon.loops import Turning
from weighbridge.storage.events import Sink
from weighbridge.storage.watch import FolderWatch

_SECONDS = 2.0


class Watching:
    """The loop's body: starts the watch, and again when it died. A watch that begins asks for a listing."""

    name = "watch"

    def __init__(self, root: Path, tell: Sink) -> None:
        self._watch = FolderWatch(root, tell)
        self._started = False

    def once(self, turning: Turning) -> float:
        """Raises BucketNotFound while there is no folder, StorageUnavailable where inotify's limits are reached."""
        if self._started:
            self._watch.ensure()
        else:
            self._watch.start()
            self._started = True
        return _SECONDS

    def stop(self) -> None:
        self._watch.stop()

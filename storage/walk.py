"""A folder's files as objects, with what they are not: every name is yielded or passed over with its reason.

One rule about links, for listings and for everything else that asks: a link to a file inside the root is that file, a
link to a folder inside is listed where the folder lies, and what leads out of the root is passed over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from weighbridge.storage import disk_errors
from weighbridge.storage.errors import ObjectNotFound, StorageError
from weighbridge.storage.keys import TEMPORARY, fault, shown
from weighbridge.storage.pins import disk_etag
from weighbridge.storage.protocols import ObjectInfo, PassedOver

MAX_DEPTH = 64
"""Folders within each other that are listed and watched."""
_SORTED = 10_000
"""Names of one folder that are held to be sorted; a larger folder comes in the disk's order, and costs no memory."""
_EPOCH = datetime.fromtimestamp(0, UTC)

Found = ObjectInfo | PassedOver | str
"""An object, what is passed over, or a folder's key that ends in `/`."""


def survey(root: Path, prefix: str) -> Iterator[ObjectInfo | PassedOver]:
    """Yield what lies under `root` with keys that start with `prefix`, depth first, a folder's names in order.

    Raises StorageError where the root itself cannot be read.
    """
    # Our own stack: Python's ends at a thousand folders.
    start = prefix.rpartition("/")[0]
    if start.count("/") >= MAX_DEPTH:
        yield _too_deep(f"{start}/")
        return
    stack = [level(root, start, prefix)]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
        elif not isinstance(found, str):
            yield found
        elif found.count("/") > MAX_DEPTH:
            yield _too_deep(found)
        else:
            stack.append(level(root, found.removesuffix("/"), prefix))


def _too_deep(folder: str) -> PassedOver:
    return PassedOver(shown(folder), f"it lies in more than {MAX_DEPTH} folders: move it up")


def level(root: Path, folder: str, prefix: str = "") -> Iterator[Found]:
    """Yield one folder's content (empty: the root's) on the way to `prefix`, or below it."""
    key = f"{folder}/" if folder else ""
    if "\0" in folder:
        return
    if (led := _led_elsewhere(root, folder)) is not None:
        if led:
            yield PassedOver(shown(key), led)
        return
    try:
        with disk_errors.translated(root, key or None), os.scandir(root / folder) as entries:
            for entry in _in_order(entries):
                name = key + entry.name
                if (name.startswith(prefix) or prefix.startswith(f"{name}/")) and (found := _found(root, name, entry)):
                    yield found
    except ObjectNotFound:
        return
    except StorageError as error:
        if not key:
            raise
        yield _unreadable(key, error)


def _failed(root: Path, key: str, error: OSError) -> PassedOver | None:
    """None for what is gone meanwhile."""
    translated = disk_errors.of_os_error(error, root, key)
    translated.__cause__ = error
    return None if isinstance(translated, ObjectNotFound) else _unreadable(key, translated)


def _unreadable(key: str, error: StorageError) -> PassedOver:
    """What the operating system does not let us look at."""
    reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
    advice = "let the daemon's user read it, or move it out of the watched folder"
    return PassedOver(shown(key), f"it cannot be read ({reason}): {advice}", error)


def find(root: Path, key: str) -> ObjectInfo | PassedOver | None:
    """Describe what lies at a valid key as `survey` does; None where nothing is, or a folder."""
    path = root / key
    if (led := _led_elsewhere(root, key.rpartition("/")[0])) is not None:
        return PassedOver(shown(key), led) if led else None
    try:
        return _linked(root, key) if path.is_symlink() else _described(key, path.lstat())
    except OSError as error:
        return _failed(root, key, error)


def describe(key: str, status: os.stat_result) -> ObjectInfo:
    """A regular file as an object."""
    return ObjectInfo(key, status.st_size, disk_etag(status), _written(status))


def is_inside(root: Path, key: str) -> bool:
    """Whether the key's path, with every link resolved, lies in the root."""
    return Path(os.path.realpath(root / key)).is_relative_to(os.path.realpath(root))


def _found(root: Path, key: str, entry: os.DirEntry[str]) -> Found | None:
    """What one name is; None for what nobody needs to hear of."""
    if entry.name.startswith(TEMPORARY):
        return None
    try:
        is_folder = entry.is_dir(follow_symlinks=False)
        if rule := fault(key):
            return PassedOver(shown(key) + "/" * is_folder, f"its name cannot be used: {rule}")
        if is_folder:
            return f"{key}/"
        return _linked(root, key) if entry.is_symlink() else _described(key, entry.stat(follow_symlinks=False))
    except OSError as error:
        return _failed(root, key, error)


def _described(key: str, status: os.stat_result) -> ObjectInfo | PassedOver | None:
    if stat.S_ISREG(status.st_mode):
        return describe(key, status)
    return None if stat.S_ISDIR(status.st_mode) else PassedOver(shown(key), "it is no regular file: copy it as one")


def _linked(root: Path, key: str) -> ObjectInfo | PassedOver | None:
    """What a link is: the file that it leads to, nothing for a folder inside, else passed over."""
    path = root / key
    if not is_inside(root, key):
        return _leads_out(root, f"{key}/" if path.is_dir() else key)
    try:
        status = path.stat()
    except FileNotFoundError:
        return PassedOver(shown(key), "it is a link to a file that is not there")
    except OSError as error:
        return PassedOver(shown(key), f"it is a link that leads nowhere ({error.strerror})")
    return _described(key, status)


def _leads_out(root: Path, key: str) -> PassedOver:
    what = "folder" if key.endswith("/") else "file"
    return PassedOver(shown(key), f"it is a link that leads out of {root}: copy the {what} into it")


def _led_elsewhere(root: Path, folder: str) -> str | None:
    """The reason why a folder is not listed because of a link on its way; empty where it is listed elsewhere."""
    if not folder or Path(os.path.realpath(root / folder)) == Path(os.path.realpath(root)) / folder:
        return None
    return "" if is_inside(root, folder) else _leads_out(root, f"{folder}/").reason


def _in_order(entries: Iterator[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
    first = list(islice(entries, _SORTED))
    if len(first) < _SORTED:
        first.sort(key=lambda entry: entry.name)
    yield from first
    yield from entries


def _written(status: os.stat_result) -> datetime:
    """When a file was written. Some clocks and tools set dates that no calendar has: then when it was last changed."""
    for seconds in (status.st_mtime, status.st_ctime):
        try:
            moment = datetime.fromtimestamp(seconds, UTC)
        except (ValueError, OverflowError, OSError):
            continue
        if datetime.min.year < moment.year < datetime.max.year:
            return moment
    return _EPOCH

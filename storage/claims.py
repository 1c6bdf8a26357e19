"""One publisher of a name at a time: a claim in the folder, put before the first byte of the checkpoint.

A claim is an object that only one of many can put (if-none-match). It says who holds it, and is renewed while bytes are
sent. One that nobody holds any more may be taken over, by the next in a row of claims: its publisher gave up, or ran on
this machine and its process is gone, or has not renewed it for `STALE` seconds. The last claim of the row counts; a
publisher that finds another one after its own sends no further file.

Their names mark the folder unfinished, so that structure alone proves nothing until the last of them is gone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from weighbridge.storage.errors import (
    AccessDenied,
    AlreadyPublished,
    NotSupported,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
)
from weighbridge.storage.protocols import ObjectInfo, Store

log = logging.getLogger(__name__)

STALE = 600.0
"""Seconds without a renewal after which a publisher is taken for dead."""
RENEW = 60.0
"""Seconds between two renewals."""

_HELD: set[str] = set()
"""The tokens of this process's claims."""
_NAME = re.compile(r"weighbridge(?:-([1-9][0-9]*))?-unfinished")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who publishes: a process of a machine. `started` tells it from a later one with its number."""

    machine: str = ""
    process: int = 0
    started: str = ""
    token: str = ""
    given_up: bool = False

    @classmethod
    def me(cls) -> Holder:
        return cls(_machine(), os.getpid(), _started(os.getpid()) or "", secrets.token_hex(8))

    @property
    def gone(self) -> bool:
        """Whether it gave up, or ran here and is no more."""
        if self.given_up or self.machine != _machine():
            return self.given_up
        if self.process == os.getpid():
            return self.token not in _HELD
        return _started(self.process) != self.started


def is_claim(name: str) -> bool:
    """Say whether a file of a checkpoint's folder is a publisher's claim."""
    return _NAME.fullmatch(name) is not None


class Claim:
    """A held claim on a folder; ends by `release` or by `give_up`."""

    def __init__(self, store: Store, folder: str, number: int, holder: Holder, clock: Callable[[], float]) -> None:
        self._store, self._folder, self._number, self._holder, self._clock = store, folder, number, holder, clock
        self._key, self._renewed = _key(folder, number), clock()

    def renew(self) -> None:
        """Say that the publisher lives, if it was not said for a while. Raises AlreadyPublished when it is not ours."""
        if self._clock() - self._renewed >= RENEW:
            self.prove()
            self._store.put(self._key, _told(self._holder))
            self._renewed = self._clock()

    def prove(self) -> None:
        """Raise AlreadyPublished unless this is still the claim that counts."""
        found = _last(self._store, self._folder)
        if found is None or found[0] != self._number or _holder(self._store, self._key) != self._holder:
            raise AlreadyPublished(
                f"{self._store.url}: another publisher took {self._folder} over: this one was silent for too long; "
                "choose another name",
                key=self._folder,
            )

    def release(self) -> None:
        """The checkpoint is whole: clear the claim away, after those that it took over.

        Where the keys may not delete, it stays: a manifest that is there counts for more.
        """
        _HELD.discard(self._holder.token)
        try:
            for number, info in _claims(self._store, self._folder):
                if number <= self._number:
                    self._store.delete(info.key)
        except (AccessDenied, NotSupported) as error:
            log.warning("the claim on %s stays in the bucket, which does no harm: %s", self._folder, error)

    def give_up(self) -> None:
        """Leave it to the next publisher, still marking what was sent as unfinished."""
        _HELD.discard(self._holder.token)
        with suppress(StorageError):  # then its age, or the end of this process, says the same
            self._store.put(self._key, _told(replace(self._holder, given_up=True)))


def take(store: Store, folder: str, *, clock: Callable[[], float] = time.time) -> Claim:
    """Claim a folder for this process, or raise AlreadyPublished, saying who holds it and until when."""
    last, holder = _last(store, folder), Holder.me()
    if last is not None:
        _prove_dead(store, folder, last[1].key, clock() - last[1].modified.timestamp())
    number = last[0] + 1 if last is not None else 0
    _HELD.add(holder.token)
    try:
        store.put(_key(folder, number), _told(holder), if_none_match=True)
    except BaseException as error:
        _HELD.discard(holder.token)
        if isinstance(error, PreconditionFailed):
            raise _busy(store, folder, "by somebody who began just now") from error
        raise
    return Claim(store, folder, number, holder, clock)


def _prove_dead(store: Store, folder: str, key: str, age: float) -> None:
    """Raise AlreadyPublished unless the holder of the last claim is dead."""
    holder = _holder(store, key)
    if holder is None or holder.gone or age >= STALE:
        return
    where = holder.machine.partition(" ")[0] or "another machine"
    raise _busy(store, folder, f"by process {holder.process} on {where}", STALE - age)


def _busy(store: Store, folder: str, who: str, left: float = STALE) -> AlreadyPublished:
    until = datetime.fromtimestamp(time.time() + left, UTC).strftime("%H:%M UTC")
    return AlreadyPublished(
        f"{store.url}: {folder} is being published {who}: choose another name; "
        f"if that publisher is dead, its name is free again at {until}",
        key=folder,
    )


def _key(folder: str, number: int) -> str:
    return f"{folder}weighbridge-{number}-unfinished" if number else f"{folder}weighbridge-unfinished"


def _claims(store: Store, folder: str) -> list[tuple[int, ObjectInfo]]:
    """The folder's claims in their row."""
    found = ((_NAME.fullmatch(info.key[len(folder) :]), info) for info in store.list(f"{folder}weighbridge"))
    return sorted(((int(match[1] or 0), info) for match, info in found if match), key=lambda one: one[0])


def _last(store: Store, folder: str) -> tuple[int, ObjectInfo] | None:
    return max(_claims(store, folder), key=lambda one: one[0], default=None)


def _holder(store: Store, key: str) -> Holder | None:
    """Who holds the claim; None: it is there no more. Where it does not say (an older publisher's) its age decides."""
    try:
        fields = json.loads(store.get(key))
        return Holder(**{name: fields[name] for name in asdict(Holder())})
    except ObjectNotFound:
        return None
    except (ValueError, KeyError, TypeError):
        return Holder()


def _told(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), sort_keys=True).encode()


def _machine() -> str:
    """This machine in its present run, as far as its processes can be seen from here (not into another container)."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def _started(process: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None: there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None

"""Who makes which call of which store: what the doctor tries, and of whom it says that they need it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum

from weighbridge.storage.probe import Call


class Role(StrEnum):
    """A process, or a person, that has keys to a store. Hosts have none."""

    DAEMON = "daemon"
    WORKER = "worker"
    REGISTRY = "registry"
    PUBLISH = "publish"


class Place(StrEnum):
    """Which of the two stores; they may be one, under two prefixes."""

    WATCHED = "watched"
    ARTIFACTS = "artifacts"


SERVICES = frozenset({Role.DAEMON, Role.WORKER, Role.REGISTRY})
"""What runs by itself. Publishers often have keys of their own, and services then none that write there."""

_WORDS = {
    Role.DAEMON: "the daemon",
    Role.WORKER: "workers",
    Role.REGISTRY: "the registry",
    Role.PUBLISH: "`push` and `publish`",
}
_WRITES = (Call.WRITE, Call.ONCE, Call.PARTS, Call.ABORT)
_STORES = frozenset({Role.WORKER, Role.REGISTRY})

NEEDS: Mapping[Place, Mapping[Call, frozenset[Role]]] = {
    Place.WATCHED: {
        Call.LIST: frozenset({Role.DAEMON, Role.PUBLISH}),
        Call.READ: frozenset({Role.DAEMON, Role.WORKER, Role.PUBLISH}),
        **dict.fromkeys((Call.UPLOADS, Call.WRITERS), frozenset({Role.DAEMON})),
        **dict.fromkeys((*_WRITES, Call.DELETE), frozenset({Role.PUBLISH})),
    },
    Place.ARTIFACTS: {
        **dict.fromkeys((Call.LIST, Call.READ, *_WRITES), _STORES),
        **dict.fromkeys((Call.RENAME, Call.DELETE), frozenset({Role.WORKER})),
    },
}
"""Calls that are not named for a place are not made there. To tell that an object is missing, keys must list."""

FOLDER_RIGHTS: Mapping[Call, str] = {
    Call.LIST: "read and search (r-x)",
    **dict.fromkeys((Call.READ, Call.WRITERS), "read files (r), and search (x),"),
    **dict.fromkeys((*_WRITES, Call.RENAME, Call.DELETE), "write and search (-wx)"),
}
"""What a call needs where the store is a folder."""


def of(place: Place, call: Call, asked: Collection[Role]) -> list[Role]:
    """Those of the roles `asked` about that need a call."""
    return [role for role in Role if role in asked and role in NEEDS[place].get(call, ())]


def words(roles: Iterable[Role]) -> str:
    return ", ".join(_WORDS[role] for role in roles)

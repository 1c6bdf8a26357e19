"""Bucket notifications as S3-like stores send them, as ObjectEvents: MinIO, AWS (direct, SNS, EventBridge), Ceph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus

from weighbridge.storage.errors import StorageError
from weighbridge.storage.events import Kind, ObjectEvent
from weighbridge.storage.keys import is_valid

MAX_BODY = 1 << 20
"""Bytes of a body that is parsed; AWS's largest message has 256 KiB."""

_EVENTBRIDGE = {
    "Object Created": Kind.CREATED,
    "Object Restore Completed": Kind.CREATED,
    "Object Deleted": Kind.REMOVED,
}


class MalformedNotification(StorageError, ValueError):
    """The body is no notification of a known shape; the message says what is missing."""


def parse(body: bytes | Mapping[str, Any] | list[Any], *, bucket: str, prefix: str = "") -> list[ObjectEvent]:
    """Return the events of one notification that concern `bucket` and keys under `prefix`, which is taken off.

    Test events, other buckets, other kinds of events, and keys that are none (a console's `folder/`) give nothing.
    Raises MalformedNotification.
    """
    folder = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    found: dict[ObjectEvent, None] = {}
    for name, key, kind, source in _changes(_decoded(body)):
        if name == bucket and key.startswith(folder) and is_valid(key[len(folder) :]):
            found[ObjectEvent(kind, key[len(folder) :], source)] = None
    return list(found)


def _decoded(body: bytes | Mapping[str, Any] | list[Any]) -> Any:
    if not isinstance(body, bytes | bytearray):
        return body
    if len(body) > MAX_BODY:
        raise MalformedNotification(f"a notification has at most {MAX_BODY:,} bytes, this one {len(body):,}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedNotification(f"the notification is no JSON: {type(error).__name__}") from error


def _changes(message: Any) -> Iterator[tuple[str, str, Kind, str]]:
    """Yield (bucket, key, kind, source) from any known shape."""
    match message:
        case {"Event": "s3:TestEvent"} | {"Type": "SubscriptionConfirmation" | "UnsubscribeConfirmation"}:
            return
        case {"Type": "Notification", "Message": str(text)}:  # SNS
            inner = _decoded(text.encode())
            if isinstance(inner, dict) and inner.get("Type") == "Notification":
                raise MalformedNotification("an SNS message holds another SNS message")
            yield from _changes(inner)
        case {"detail-type": str(kind), "detail": dict(detail)}:  # EventBridge, whose keys are not URL-encoded
            if kind in _EVENTBRIDGE:
                key = _text(detail, "object", "key")
                yield _text(detail, "bucket", "name"), key, _EVENTBRIDGE[kind], "eventbridge"
        case {"Records": list(records)} | {"Event": list(records)}:
            for record in records:
                yield from _record(record)
        case list(items):  # MinIO's `access` format
            for item in items:
                if not isinstance(item, dict):
                    raise MalformedNotification("a list of notifications holds something else")
                yield from _changes(item)
        case _:
            shape = sorted(map(str, message))[:5] if isinstance(message, dict) else type(message).__name__
            raise MalformedNotification(f"not the shape of any known bucket notification: {shape}")


def _record(record: Any) -> Iterator[tuple[str, str, Kind, str]]:
    name = _text(record, "eventName").removeprefix("s3:")
    if name.startswith(("ObjectCreated:", "ObjectRestore:", "ObjectSynced:")):
        kind = Kind.CREATED
    elif name.startswith(("ObjectRemoved:", "LifecycleExpiration:", "ObjectLifecycle:Expiration")):
        kind = Kind.REMOVED
    else:
        return
    bucket, raw = _text(record, "s3", "bucket", "name"), _text(record, "s3", "object", "key")
    source = str(record.get("eventSource", "s3")).replace("minio:s3", "minio").replace("aws:s3", "aws")
    yield bucket, unquote_plus(raw), kind, source
    if source.startswith("ceph"):
        yield bucket, raw, kind, source  # some of its versions do not encode; a false hint costs one look


def _text(record: Any, *path: str) -> str:
    value = record
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value:
        raise MalformedNotification(f"a record has no {'.'.join(path)}")
    return value

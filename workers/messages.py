"""What a worker believes of a message of the broker: one job id. Whoever can write to the broker can write anything.

Everything else (task names, retries, times, callbacks, groups, compression) is Celery's business with itself, and is
neither looked at nor passed on: a message is read by its one known shape, and replaced by a clean one. What has another
shape is dropped. Pure but for `Dropped`, which counts.
"""

from __future__ import annotations

import binascii
import json
import logging
import time
import uuid
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable
from typing import Any

from weighbridge.workers.app import TASK

logger = logging.getLogger(__name__)

MOST = 4096
"""Bytes of a body, as it travels. Ours have about a hundred."""
_MOST_ID = 2**31
_MOST_TAG = 100
_QUIET_SECONDS = 60.0
"""The same is not said twice within this."""


class Forged(ValueError):
    """A message that no sender of ours sends; the message says which rule it breaks, and nothing of its content."""


def clean(envelope: object) -> dict[str, Any]:
    """A message of Kombu's with the job id of this one and nothing else of it. Raises Forged."""
    if not isinstance(envelope, dict):
        raise Forged("it is no object")
    headers, properties = envelope.get("headers"), envelope.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise Forged("it has no headers, or no properties")
    if headers.get("task") != TASK:
        raise Forged(f"its task is not {TASK}")
    if headers.get("compression") or envelope.get("content-type") != "application/json":
        raise Forged("it is compressed, or no JSON")
    tag, info = properties.get("delivery_tag"), properties.get("delivery_info")
    if not isinstance(tag, str) or not 0 < len(tag) <= _MOST_TAG or not isinstance(info, dict):
        raise Forged("it has no tag, or no way that it came")
    return _written(_job_id(_body(envelope.get("body"), properties.get("body_encoding"))), tag, _route(info))


def _body(text: object, encoding: object) -> object:
    if not isinstance(text, str) or len(text) > MOST:
        raise Forged(f"its body is no text of at most {MOST} characters")
    try:
        return json.loads(b64decode(text, validate=True) if encoding == "base64" else text)
    except (binascii.Error, ValueError, RecursionError) as exc:
        raise Forged("its body is no JSON") from exc


def _job_id(body: object) -> int:
    match body:
        case [[int(job_id)], dict(), *_] if not isinstance(job_id, bool) and 0 < job_id < _MOST_ID:
            return job_id
    raise Forged("its only argument is no job id")


def _route(info: dict[str, Any]) -> dict[str, str]:
    """Where it goes back to if nobody acknowledges it."""
    exchange, key = info.get("exchange"), info.get("routing_key")
    if not isinstance(exchange, str) or not isinstance(key, str):
        raise Forged("it has no exchange, or no routing key")
    return {"exchange": exchange, "routing_key": key}


def _written(job_id: int, tag: str, route: dict[str, str]) -> dict[str, Any]:
    body = json.dumps([[job_id], {}, {}]).encode()
    return {
        "body": b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": TASK, "id": str(uuid.uuid4())},
        "properties": {"delivery_tag": tag, "delivery_info": route, "body_encoding": "base64", "priority": 0},
    }


class Dropped:
    """Says what was dropped: a line for each rule, and no more than one a minute, however many there are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._said = clock, dict[str, float]()
        self._more = Counter[str]()

    def say(self, rule: str) -> None:
        """Write the line, or count for the next one. `rule` is ours, never the message's."""
        now = self._clock()
        if now - self._said.get(rule, -_QUIET_SECONDS) < _QUIET_SECONDS:
            self._more[rule] += 1
            return
        self._said[rule] = now
        more = self._more.pop(rule, 0)
        logger.warning("a forged message was dropped: %s%s", rule, f" (and {more} more like it)" if more else "")

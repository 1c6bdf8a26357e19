"""Bells between processes: "look now", nothing more. A ring that is lost costs a poll, never data.

Topics: `jobs`, `events`, `hosts`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import redis
from pydantic import SecretStr

logger = logging.getLogger(__name__)

_SOCKET_SECONDS = 1.0
_QUIET_SECONDS = 1.0
"""After a failure nothing is sent or connected for this long: a dead broker must not slow the callers."""
_POLL_SECONDS = 0.5


class Bell:
    """Hears some topics. Every ring since the last `wait` counts as one."""

    def __init__(self, topics: tuple[str, ...], then: Callable[[], None] | None = None) -> None:
        self.topics = frozenset(topics)
        self._rung, self._then = threading.Event(), then

    def ring(self) -> None:
        self._rung.set()
        if self._then is not None:
            self._then()

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; True if it was rung since the last wait."""
        rung = self._rung.wait(timeout)
        self._rung.clear()
        return rung


class Notifier(Protocol):
    def ring(self, topic: str) -> None:
        """Tell everybody who listens to the topic. Never raises, never waits long."""
        ...

    def listen(self, *topics: str, then: Callable[[], None] | None = None) -> contextlib.AbstractContextManager[Bell]:
        """Open a bell for the topics. `then` is called at each ring, in the thread that rings: it must not wait."""
        ...

    def close(self) -> None: ...


class LocalNotifier:
    """Bells within this process."""

    def __init__(self) -> None:
        self._bells: set[Bell] = set()
        self._lock = threading.Lock()

    def ring(self, topic: str) -> None:
        for bell in self._open():
            if topic in bell.topics:
                bell.ring()

    @contextlib.contextmanager
    def listen(self, *topics: str, then: Callable[[], None] | None = None) -> Iterator[Bell]:
        bell = Bell(topics, then)
        with self._lock:
            self._bells.add(bell)
        try:
            yield bell
        finally:
            with self._lock:
                self._bells.discard(bell)

    def close(self) -> None: ...

    def _open(self) -> list[Bell]:
        with self._lock:
            return list(self._bells)


class ValkeyNotifier(LocalNotifier):
    """Bells between processes over Valkey's pub/sub; one thread, started by the first `listen`, hears for all bells."""

    def __init__(self, url: str, channel: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"socket_connect_timeout": _SOCKET_SECONDS, "socket_timeout": _SOCKET_SECONDS}
        self._client = redis.Redis.from_url(redis_url(url), **options)
        self._prefix = f"{channel}:bell:"
        self._quiet_until = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def ring(self, topic: str) -> None:
        if time.monotonic() < self._quiet_until:
            return
        try:
            self._client.publish(self._prefix + topic, b"")
        except (redis.RedisError, OSError) as exc:
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            logger.debug("the ring %r is lost: %s", topic, exc)

    @contextlib.contextmanager
    def listen(self, *topics: str, then: Callable[[], None] | None = None) -> Iterator[Bell]:
        with super().listen(*topics, then=then) as bell:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._hear, name="weighbridge-bells", daemon=True)
                    self._thread.start()
            yield bell

    def close(self) -> None:
        """End the thread and the connections."""
        self._ended.set()
        if self._thread is not None:
            self.ring("end")  # Nobody listens to it, but the thread wakes up.
            self._thread.join(_SOCKET_SECONDS + _POLL_SECONDS)
        self._client.close()

    def _hear(self) -> None:
        while not self._ended.is_set():
            try:
                with self._client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
                    pubsub.psubscribe(self._prefix + "*")
                    self._pass_on(pubsub)
            except (redis.RedisError, OSError) as exc:
                logger.debug("no bells from the broker: %s", exc)
                self._ended.wait(_QUIET_SECONDS)

    def _pass_on(self, pubsub: Any) -> None:
        while not self._ended.is_set():
            message = pubsub.get_message(timeout=_POLL_SECONDS)
            if message is None:
                continue
            if message["type"] == "psubscribe":
                for bell in self._open():  # Something may have rung while nobody heard.
                    bell.ring()
            elif message["type"] == "pmessage":
                super().ring(message["channel"].decode().removeprefix(self._prefix))


_local: dict[tuple[str, str], LocalNotifier] = {}


def open_notifier(url: str | SecretStr, channel: str) -> Notifier:
    """Open the bells of a broker; `memory://` connects everything within this process."""
    plain = url.get_secret_value() if isinstance(url, SecretStr) else url
    if plain.startswith("memory://"):
        return _local.setdefault((plain, channel), LocalNotifier())
    return ValkeyNotifier(plain, channel)


def redis_url(url: str) -> str:
    """Celery's `redis+socket:///path?virtual_host=0` as the client's `unix:///path?db=0`."""
    parts = urlsplit(url)
    if parts.scheme != "redis+socket":
        return url
    user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    return f"unix://{user}{parts.path}?db={parse_qs(parts.query).get('virtual_host', ['0'])[0]}"

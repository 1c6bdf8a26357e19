"""The broker, the database, the registry's API and the hosts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from weighbridge.cli.doctor.finding import Finding
from weighbridge.cli.exits import Failed, needs
from weighbridge.cli.session import Session
from weighbridge.words import counted

if TYPE_CHECKING:
    from redis import Redis

    from weighbridge.registry.schemas import Host


def broker(run: Session) -> Iterator[Finding]:
    """It answers, keeps its data over a restart, and drops nothing when it is full."""
    url = run.settings.broker.url.get_secret_value()
    if url.startswith("memory://"):
        yield Finding("broker", True, "in memory of one process, which is for tests")
        return
    redis = _redis(url)
    try:
        _ping(redis)
        yield Finding("broker", True, f"answers: {_server(redis)}")
        yield from _kept(redis)
    finally:
        redis.close()


def database(run: Session) -> Iterator[Finding]:
    """It answers and has this release's schema."""
    with needs("registry"):
        from weighbridge.registry.db import Database
    opened = Database(run.settings.database_url)
    try:
        opened.check()
        yield Finding("database", True, f"{opened.url_safe} answers, its schema is this release's")
    finally:
        opened.close()


def registry(run: Session) -> Iterator[Finding]:
    """The API answers, and knows us."""
    with run.client() as client:
        seen = client.status()
        count = counted(seen.open_checkpoints, "checkpoint")
        waiting = f", {count} open (`weighbridge status`)" if seen.open_checkpoints else ""
        there = f"{counted(seen.models, 'model')}, {counted(seen.hosts, 'host')}"
        yield Finding("registry", True, f"{client.url} answers: {there}{waiting}")


def hosts(run: Session) -> Iterator[Finding]:
    """Every host was heard of within `registry.silent_seconds`, and none of its slots failed."""
    with run.client() as client:
        found = list(client.hosts())
    if not found:
        yield Finding("hosts", True, "none is enrolled: nothing will be served until `weighbridge host` runs")
    for host in found:
        yield _host(host)


def _host(host: Host) -> Finding:
    if host.silent:
        since = "was never heard of" if host.silent_seconds is None else f"is silent for {host.silent_seconds:.0f} s"
        fix = f"start it again, or take it out: `weighbridge retire {host.name}`"
        return Finding("hosts", False, f"{host.name} {since}", fix)
    for assignment in host.assignments:
        for slot in assignment.observed.slots if assignment.observed else ():
            if slot.state == "failed":
                what = f"{host.name}: {assignment.model} {slot.version} failed: {slot.reason}"
                return Finding(
                    "hosts", False, what, "see the host's log; `weighbridge rollouts list` tells what follows"
                )
    return Finding("hosts", True, f"{host.name} is {host.state}")


def _redis(url: str) -> Redis:
    with needs("registry"):
        from redis import Redis

        from weighbridge.registry.notify import redis_url
    return Redis.from_url(redis_url(url), socket_connect_timeout=5, socket_timeout=5)


def _ping(redis: Redis) -> None:
    from redis.exceptions import AuthenticationError, RedisError

    try:
        redis.ping()
    except AuthenticationError as exc:
        raise Failed(f"the password is refused ({exc}): correct broker.url") from exc
    except RedisError as exc:
        raise Failed(f"does not answer ({exc}): start Valkey or Redis, or correct broker.url") from exc


def _server(redis: Redis) -> str:
    info: Any = redis.info("server")
    name = "Valkey" if "valkey_version" in info else "Redis"
    return f"{name} {info.get('valkey_version') or info.get('redis_version')}"


def _kept(redis: Redis) -> Iterator[Finding]:
    """Managed services often forbid CONFIG; then nothing can be said, and nothing is."""
    from redis.exceptions import RedisError

    try:
        config: Any = redis.config_get("maxmemory-policy", "appendonly")
    except RedisError:
        return
    policy = config.get("maxmemory-policy", "noeviction")
    fix = "" if policy == "noeviction" else "set maxmemory-policy noeviction: a full broker must refuse, not forget"
    yield Finding("broker", policy == "noeviction", f"maxmemory-policy is {policy}", fix)
    if config.get("appendonly") == "no":
        yield Finding("broker", True, "appendonly is off: a restart costs time (jobs are sent again), never data")

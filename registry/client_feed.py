"""Waiting without sleeping: the event feed tells when there is something to look at."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import Final

from weighbridge.registry.client_http import Http, patiently
from weighbridge.registry.errors import Invalid, NotFound, NothingToCome
from weighbridge.registry.schemas import Checkpoint, Event, Page, Version, VersionDetail
from weighbridge.storage import names

POLL_SECONDS: Final = 30.0
"""Longest wait of one call."""
ENDED: Final = frozenset({"ready", "rejected", "quarantined", "needs_binding", "superseded", "duplicate", "archived"})
"""Statuses that no job changes by itself (but for the fast lane, where evaluation may still reject a ready version)."""


def events(
    http: Http,
    after: int | None,
    *,
    limit: int | None = None,
    model: str | None = None,
    kinds: Collection[str] | None = None,
    wait: float = 0.0,
) -> Page[Event]:
    """One page of the feed; `next` is where to go on, also when it is empty. Without `after`: from now on."""
    params = {"after": after, "limit": limit, "model": model, "kind": sorted(kinds) if kinds else None, "wait": wait}
    return Page[Event].model_validate_json(http.send("GET", "/v1/events", params=params, wait=wait).content)


def watch(
    http: Http, after: int | None, *, model: str | None = None, kinds: Collection[str] | None = None
) -> Iterator[Event]:
    """Every event behind `after`, for ever, none twice; goes on when the registry was away."""
    cursor = _end(http) if after is None else after
    while True:
        page = patiently()(events, http, cursor, model=model, kinds=kinds, wait=POLL_SECONDS)
        yield from page.items
        cursor = _next(page)


def wait(
    http: Http,
    model: str,
    *,
    version: int | str | None,
    path: str | None,
    until: Collection[str],
    timeout: float | None,
) -> VersionDetail:
    """Return the version once its status is in `until`, or once it ended otherwise.

    Raises TimeoutError, saying what it waits for; NothingToCome where waiting is in vain; Invalid for a folder's path
    without its slash. NotFound only for a numbered version: a path may come yet.
    """
    if (version is None) == (path is None):
        raise ValueError("give either version or path")
    look = (lambda: detail(http, model, version)) if version is not None else (lambda: _coming(http, model, path or ""))
    return _until(
        http,
        model,
        look,
        lambda found: found.status in until or found.status in ENDED or _prove_going(found),
        lambda found: _waits_for(http, model, path, found),
        timeout,
    )


def wait_variants(http: Http, model: str, version: int | str, *, timeout: float | None) -> VersionDetail:
    """Return the version once nothing more is to come of its variants, or once it ended without being ready.

    Raises NotFound; TimeoutError, naming what is still to come.
    """
    return _until(
        http,
        model,
        lambda: detail(http, model, version),
        lambda found: found.status in ENDED and (found.variants_settled or found.status != "ready"),
        _unsettled,
        timeout,
    )


def _until(
    http: Http,
    model: str,
    look: Callable[[], VersionDetail | None],
    done: Callable[[VersionDetail], bool],
    complaint: Callable[[VersionDetail | None], str],
    timeout: float | None,
) -> VersionDetail:
    """Look again whenever something of the model happened, until it is done. Raises TimeoutError(complaint)."""
    deadline = None if timeout is None else time.monotonic() + timeout
    left: Callable[[], float | None] = lambda: None if deadline is None else max(deadline - time.monotonic(), 0.0)  # noqa: E731
    cursor = patiently(left())(_end, http)
    while True:
        found = patiently(left())(look)
        if found is not None and done(found):
            return found
        remaining = left()
        if remaining == 0.0:
            raise TimeoutError(complaint(found))
        pause = POLL_SECONDS if remaining is None else min(remaining, POLL_SECONDS)
        cursor = _next(patiently(remaining)(events, http, cursor, model=model, wait=pause))


def detail(http: Http, model: str, selector: int | str) -> VersionDetail:
    return http.get(VersionDetail, f"/v1/models/{quoted(model)}/versions/{quoted(str(selector))}")


def quoted(part: str) -> str:
    """A name as one part of a path."""
    from urllib.parse import quote

    return quote(part, safe="")


def _coming(http: Http, model: str, path: str) -> VersionDetail | None:
    """The newest version of a path; None while one may come. Raises NothingToCome, Invalid."""
    if (found := _newest(http, model, path)) is not None:
        return detail(http, model, found.number)
    row = _checkpoint(http, model, path)
    if row is not None and (row.state == "refused" or row.needs_person):
        raise NothingToCome(model, path, row.state, row.reason)
    if row is None and not path.endswith("/") and not names.is_candidate(path):
        folder = f"{path}/"
        if _newest(http, model, folder) or _checkpoint(http, model, folder):
            raise Invalid(
                f"path {path!r} is no checkpoint of {model}, but the folder {folder!r} is: end it with a slash"
            )
    return None


def _prove_going(found: VersionDetail) -> bool:
    """False, while a job goes on. Raises NothingToCome where one was set aside: only `rejudge` begins anew."""
    states = {job.state for job in found.jobs}
    if "set_aside" in states and not states & {"queued", "running"}:
        reason = next(job.reason for job in reversed(found.jobs) if job.state == "set_aside")
        raise NothingToCome(found.model, found.path, "set aside", found.reason or reason)
    return False


def _newest(http: Http, model: str, path: str) -> Version | None:
    return next(http.pages(Version, "/v1/versions", model=model, path=path, limit=1), None)


def _meant(model: str, path: str) -> str:
    """What may be wrong with a path that was never seen, in words; empty where nothing is."""
    folders = path.removesuffix("/").split("/")[:-1]
    if "" in folders or names.composed(model) not in map(names.composed, folders):
        return f"; it does not lie in the folder of {model}: give its key in the bucket, such as '{model}/run-1/'"
    if not path.endswith("/") and not names.is_candidate(path):
        return f"; it is no file of weights, and a folder's path ends with a slash: {path + '/'!r}"
    return ""


def _checkpoint(http: Http, model: str, path: str) -> Checkpoint | None:
    """What was seen at the path that is no version."""
    rows = http.pages(Checkpoint, "/v1/checkpoints", model=model, path=path)
    return next((row for row in rows if row.path == path), None)  # an older registry does not know `path`


def _unsettled(found: VersionDetail | None) -> str:
    assert found is not None, "a version that is not there is an error at once"
    if found.status != "ready":
        return f"version {found.number} of {found.model} is still {found.status}"
    open_jobs = [
        f"{variant.name} {job.stage} {job.state}"
        for variant in found.variants
        for job in variant.jobs
        if job.state in ("queued", "running")
    ]
    return (
        f"variants of version {found.number} of {found.model} are not settled: {', '.join(open_jobs) or 'no job yet'}"
    )


def _waits_for(http: Http, model: str, path: str | None, found: VersionDetail | None) -> str:
    if found is not None:
        running = ", ".join(f"{job.stage} {job.state}" for job in found.jobs if job.state in ("queued", "running"))
        return f"version {found.number} of {model} is still {found.status}" + (running and f" ({running})")
    waiting = _checkpoint(http, model, path or "")
    if waiting is None:
        return f"no checkpoint {path} of {model} was seen in the bucket yet{_meant(model, path or '')}"
    return f"checkpoint {path} of {model} is {waiting.state}: {waiting.reason}"


def _end(http: Http) -> int:
    return _next(events(http, None, limit=1))


def _next(page: Page[Event]) -> int:
    if page.next is None:
        raise NotFound("cursor", "in the event feed's answer")
    return int(page.next)

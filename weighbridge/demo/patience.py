"""How long the demo waits for something, and what it says of it when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from weighbridge.registry.schemas import Job, VersionDetail

_LINES = 12
"""Of each log's end."""


class Stuck(TimeoutError):
    """Something did not come. `details` are lines: the work that did not end."""

    def __init__(self, message: str, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.details = details


class Patience:
    """Goes on for as long as something moves, but not for ever: a busy machine is slow, a broken one stands still."""

    def __init__(self, what: str, *, still: float, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`still`, `longest`: seconds without any movement, and altogether."""
        self._what, self._still, self._longest, self._clock = what, still, longest, clock
        self._began = self._moved = clock()
        self._state: object = None

    def look(self, state: object, details: tuple[str, ...] = ()) -> None:
        """Another state is movement. Raises Stuck, with `details`."""
        now = self._clock()
        if state != self._state:
            self._state, self._moved = state, now
        if now - self._began > self._longest:
            raise Stuck(f"{self._what} took longer than {self._longest:g} s", details)
        if now - self._moved > self._still:
            raise Stuck(f"{self._what}: nothing has moved for {self._still:g} s", details)


def unfinished(version: VersionDetail) -> Iterator[tuple[str, Job]]:
    """The jobs of a version and its variants that have not ended, each with whose it is."""
    for variant in version.variants:
        yield from ((f"{version.model} {variant.name}", job) for job in variant.jobs if job.finished_at is None)
    yield from ((f"{version.model} {version.number}", job) for job in version.jobs if job.finished_at is None)


def told(whose: str, job: Job) -> str:
    """A job in one line: `digits onnx: benchmark is running, attempt 2 of 8, 40% done: try 1 was …`."""
    reason = f": {job.reason}" if job.reason else ""
    done = f", {job.progress:.0%} done" if job.progress else ""
    return f"{whose}: {job.stage} is {job.state}, attempt {job.attempt} of {job.max_attempts}{done}{reason}"


def log_ends(data: Path) -> Iterator[str]:
    """The last lines of what `up` and everything that it started wrote."""
    for log in (data / "up.log", *sorted((data / "logs").glob("*.log"))):
        if lines := log.read_text(errors="replace").splitlines()[-_LINES:] if log.exists() else []:
            yield f"{log} ends:"
            yield from (f"  {line}" for line in lines)

"""Events as lines: who, what, of which alias, path or variant, why, and when in UTC."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from weighbridge.cli import telling
from weighbridge.registry.schemas import Event

THEN = datetime(2026, 11, 25, 11, 30, 5, tzinfo=timezone(timedelta(hours=2)))


def event(kind: str = "version.ready", **changes: Any) -> Event:
    given = {"seq": 7, "kind": kind, "model": "digits", "version": 3, "actor": "ada", "created_at": THEN}
    return Event.model_validate(given | changes)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (event(reason="accuracy 0.9"), "version.ready          digits 3 by ada: accuracy 0.9"),
        (
            event("alias.moved", subject="alias:champion", before={"number": 2}, after={"number": 3}),
            "alias.moved            digits 3 champion, 2 before by ada",
        ),
        (
            event("alias.deleted", version=None, subject="alias:staging", before={"number": 2}),
            "alias.deleted          digits staging, 2 before by ada",
        ),
        (
            event("checkpoint.waiting", version=None, subject="checkpoint:4", after={"path": "digits/run-1/"}),
            "checkpoint.waiting     digits (digits/run-1/) by ada",
        ),
        (
            event("variant.ready", subject="variant:9", after={"name": "bf16"}),
            "variant.ready          digits 3 bf16 by ada",
        ),
        (event("rollout.started", subject="rollout:2"), "rollout.started        digits 3 rollout 2 by ada"),
        (
            event("host.enrolled", model=None, version=None, subject="host:ab", after={"name": "gpu-7"}, actor=""),
            "host.enrolled          gpu-7",
        ),
        (
            event("store.away", model=None, version=None, subject="store", after={"store": "s3://b"}, actor="daemon"),
            "store.away             store s3://b by daemon",
        ),
    ],
)
def test_a_line(given: Event, words: str) -> None:
    """The alias, the path, the variant are named; the moment is in UTC and says so."""
    assert telling.line(given) == f"     7 2026-11-25 09:30:05Z {words}"


def test_a_line_is_one_line() -> None:
    """Whatever a name from a bucket holds."""
    assert "\n" not in telling.line(event(reason="a\nb\x1b[2J"))


class _Client:
    """What a registry tells."""

    def __init__(self, told: list[Event]) -> None:
        self._told = told

    def status(self) -> Any:
        return type("Status", (), {"last_seq": 7})

    def watch(self, after: int) -> Iterator[Event]:
        assert after == 0
        yield from self._told


def test_up_tells_what_happens_from_its_start_on(capfd: pytest.CaptureFixture[str]) -> None:
    """Not what was before it, and not every job."""
    told = [event(seq=1, created_at=THEN - timedelta(days=1)), event("job.retried"), event("version.rejected")]
    for json in (False, True):
        telling.follow(_Client(told), THEN, json=json)  # type: ignore[arg-type]
    text, data = capfd.readouterr().out.splitlines()
    assert "version.rejected" in text
    assert '"kind": "version.rejected"' in data


def test_who_stops_reading_stops_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else."""

    def broken(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    telling.follow(_Client([event()]), datetime.fromtimestamp(0, UTC), json=False)  # type: ignore[arg-type]

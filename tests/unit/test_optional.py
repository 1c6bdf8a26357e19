"""Calls that can be done without: one warning, and no more than that."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from weighbridge.storage import optional
from weighbridge.storage.errors import (
    AccessDenied,
    BucketNotFound,
    NotSupported,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from weighbridge.storage.optional import OptionalCall

DENIED = AccessDenied("s3://b: refused", permission="s3:PutHat")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def hats(clock: Clock | None = None, permission: str | None = "s3:PutHat") -> OptionalCall:
    return OptionalCall("s3://b", "put hats", without="heads stay bare", permission=permission, clock=clock or Clock())


def raising(error: Exception) -> Callable[[], str]:
    def call() -> str:
        raise error

    return call


@pytest.mark.parametrize("error", [DENIED, NotSupported("501"), StorageError("s3://b: the store answered 400")])
def test_it_is_done_without_and_said_once(error: StorageError, caplog: pytest.LogCaptureFixture) -> None:
    """However often it fails, one line says what is missing and what is done instead; when it works again, one more."""
    call = hats()
    with caplog.at_level(logging.INFO, optional.log.name):
        assert [call(raising(error), lambda: "bare") for _ in range(5)] == ["bare"] * 5
        assert call.missing is error
        assert [call(lambda: "hat", lambda: "bare") for _ in range(3)] == ["hat"] * 3
    assert call.missing is None
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("WARNING", "INFO")
    assert "put hats" in first.message
    assert "heads stay bare" in first.message
    assert ("allow s3:PutHat" in first.message) == (error is DENIED)


@pytest.mark.parametrize(
    "error",
    [
        AccessDenied("s3://b: no usable credentials"),
        BucketNotFound("s3://b"),
        ObjectNotFound("k"),
        PreconditionFailed("k"),
        StorageUnavailable("503"),
    ],
)
def test_what_is_no_want_of_the_call_is_raised(error: StorageError, caplog: pytest.LogCaptureFixture) -> None:
    """Wrong keys, a missing bucket, a condition that does not hold, a store that is away: nothing is done instead."""
    with pytest.raises(type(error)):
        hats()(raising(error), lambda: "bare")
    assert caplog.records == []


def test_a_call_that_needs_no_right_is_not_done_without_for_want_of_one() -> None:
    """Whoever may not read under a condition may not read at all."""
    with pytest.raises(AccessDenied):
        hats(permission=None)(raising(DENIED), lambda: "bare")


def test_what_fails_both_ways_is_not_said_to_be_done_without(caplog: pytest.LogCaptureFixture) -> None:
    """The second error is the one that tells."""
    call = hats()
    with pytest.raises(StorageUnavailable):
        call(raising(DENIED), raising(StorageUnavailable("503")))
    assert (call.missing, caplog.records) == (None, [])


def test_keys_that_may_here_and_may_not_there_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A call that works now and then is warned of again after ten minutes at the earliest."""
    clock = Clock()
    call = hats(clock)
    for _ in range(100):
        call(raising(DENIED), lambda: "bare")
        call(lambda: "hat", lambda: "bare")
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 1
    clock.now += optional.SILENT
    call(raising(DENIED), lambda: "bare")
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 2

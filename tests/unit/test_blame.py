"""Whose fault a failure is: the table, row by row."""

from __future__ import annotations

import pytest

from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.hosts import blame, errors
from weighbridge.hosts.blame import Blame

ROWS = [
    (errors.BadRequest(), 400, Blame.CLIENT),
    (errors.UnsupportedEncoding(), 415, Blame.CLIENT),
    (errors.TooLarge(), 413, Blame.CLIENT),
    (errors.BodyLate(), 408, Blame.CLIENT),
    (errors.ClientLeft(), 499, Blame.CLIENT),
    (errors.TooMuchHeld(), 429, Blame.CLIENT),
    (errors.RouteNotFound(), 404, Blame.CLIENT),
    (errors.ModelNotFound(), 404, Blame.CLIENT),
    (errors.VersionNotLoaded(), 404, Blame.CLIENT),
    (errors.MethodNotAllowed("no", "GET"), 405, Blame.CLIENT),
    (errors.OutsideContract(), 400, Blame.REFUSED),
    (errors.TooCostly(), 413, Blame.REFUSED),
    (errors.ProgramFailed("index out of range", own=False), 500, Blame.INPUT),
    (errors.ProgramFailed("index out of range", own=True), 500, Blame.VERSION),
    (errors.Crashed(), 503, Blame.INPUT),
    (errors.ChildDied(), 503, Blame.NOBODY),
    (errors.DeadlineExceeded(), 504, Blame.INPUT),
    (errors.Overlong(), 504, Blame.INPUT),
    (errors.Hung(), 504, Blame.VERSION),
    (errors.Blocked(), 504, Blame.NOBODY),
    (errors.NotReady(), 503, Blame.NOBODY),
    (errors.Overloaded(), 503, Blame.NOBODY),
]


@pytest.mark.parametrize(("error", "status", "fault"), ROWS, ids=lambda value: type(value).__name__)
def test_every_failure_has_a_status_and_somebody_to_blame(error: errors.HostError, status: int, fault: Blame) -> None:
    """What a client sees and what a version is charged with are decided by the kind of failure alone."""
    assert (error.status, blame.of(error)) == (status, fault)


def test_every_error_of_a_request_is_in_the_table() -> None:
    """A new kind of failure must say whose it is; those of loading belong to no request."""
    named = {type(error) for error, _, _ in ROWS}
    loading = {errors.LoadFailed, errors.GoldenFailed}

    def below(kind: type[errors.HostError]) -> set[type[errors.HostError]]:
        return {kind}.union(*(below(one) for one in kind.__subclasses__()))

    assert below(errors.HostError) - {errors.HostError} - loading == named


def test_the_engines_refusals_and_what_nobody_foresaw() -> None:
    """Inputs outside the contract are refused; an error of no known kind is the version's own."""
    assert blame.of(InvalidInput("x")) is Blame.REFUSED
    assert blame.of(EngineError("x")) is Blame.VERSION
    assert blame.of(ZeroDivisionError()) is Blame.VERSION

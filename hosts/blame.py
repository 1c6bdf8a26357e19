"""Whose fault it is that a request got no answer. One table; nothing else of a host decides it. Pure.

| what happened | status | blame |
|---|---|---|
| the request is malformed, too large for any version, undecodable | 400, 413, 415 | client |
| it did not arrive whole in time; its client left; its address holds too much | 408, 499, 429 | client |
| outside the version's contract: names, datatypes, shapes, values, memory | 400, 413 | refused |
| the program failed, and answers the golden's first row as recorded | 500 | input |
| the engine child ended (crash, memory) while it computed this request | 503 | input |
| no answer in time, though the child answered others or made progress | 504 | input |
| no answer in time, and the child computed this request all the while | 504 | input |
| the program failed, and fails on the golden's first row too | 500 | version |
| no answer in time, and neither a sign of life nor work since the child has the request | 504 | version |
| the queue is full, nothing is loaded yet, the child ended for another's request | 503 | nobody |
| no answer in time, and the one before it did not end either | 504 | nobody |

`client` and `nobody` say nothing about a version and are not counted as its requests. `version` is judged by itself.
`refused` and `input` may lie in what was asked. Where the version that served before is still loaded, it is asked the
same: if it fails too, the fault is the client's; if it answers, the version's. What is not asked again is counted as it
is, and compared with hosts that serve the old version (workers.judge).
"""

from __future__ import annotations

from enum import StrEnum

from weighbridge.engines.errors import InvalidInput
from weighbridge.hosts import errors


class Blame(StrEnum):
    NONE = "none"
    """It was answered."""
    CLIENT = "client"
    NOBODY = "nobody"
    REFUSED = "refused"
    INPUT = "input"
    VERSION = "version"


UNJUDGED = frozenset({Blame.CLIENT, Blame.NOBODY})
"""What says nothing about a version."""

_TABLE: dict[type[Exception], Blame] = {
    errors.BadRequest: Blame.CLIENT,
    errors.BodyLate: Blame.CLIENT,
    errors.ClientLeft: Blame.CLIENT,
    errors.TooMuchHeld: Blame.CLIENT,
    errors.RouteNotFound: Blame.CLIENT,
    errors.MethodNotAllowed: Blame.CLIENT,
    errors.ModelNotFound: Blame.CLIENT,
    errors.VersionNotLoaded: Blame.CLIENT,
    errors.OutsideContract: Blame.REFUSED,
    InvalidInput: Blame.REFUSED,
    errors.NotReady: Blame.NOBODY,
    errors.Overloaded: Blame.NOBODY,
    errors.ChildDied: Blame.NOBODY,
    errors.Crashed: Blame.INPUT,
    errors.DeadlineExceeded: Blame.INPUT,
    errors.Overlong: Blame.INPUT,
    errors.Hung: Blame.VERSION,
    errors.Blocked: Blame.NOBODY,
    errors.ProgramFailed: Blame.INPUT,
}


def of(error: BaseException) -> Blame:
    """Whose fault an error is, by its nearest class in the table; what nobody foresaw is the version's."""
    if isinstance(error, errors.ProgramFailed) and error.own:
        return Blame.VERSION
    return next((_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE), Blame.VERSION)

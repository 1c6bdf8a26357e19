"""What the registry can refuse, as nouns with data that are also what they mean."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from weighbridge import limits


class RegistryError(Exception):
    """The root. `status` is the HTTP status that the API answers with, `code` the problem's stable name."""

    status = 500
    code = "internal"


class NotFound(RegistryError, LookupError):
    """`what` (model, version, host …) named `name` is not there; `near`: what may have been meant."""

    status = 404
    code = "not-found"

    def __init__(self, what: str, name: object, near: str = "") -> None:
        super().__init__(f"no {what} {name}" + (f": did you mean {near}?" if near else ""))
        self.what, self.name, self.near = what, name, near


class Conflict(RegistryError):
    """The state does not allow it, or somebody was faster; the message says what is there."""

    status = 409
    code = "conflict"


class LeavesNothing(Conflict):
    """What was asked would leave hosts, or those that join, with nothing to serve; `force` does it all the same.

    `model`, `hosts` and `aliases` name what would be lost.
    """

    code = "leaves-nothing"

    def __init__(
        self, what: str, model: str, *, hosts: Sequence[str] = (), aliases: Sequence[str] = (), instead: str
    ) -> None:
        whom = f"host{'s' * (len(hosts) > 1)} {', '.join(hosts)}" if hosts else f"the fleet of {model}"
        lost = f" ({', '.join(aliases)} would name nothing that is served)" if aliases else ""
        super().__init__(
            f"{what} leaves {whom} with nothing of {model} to serve{lost}: {instead}; or force it (--force, force=true)"
        )
        self.model, self.hosts, self.aliases = model, list(hosts), list(aliases)


class NothingToCome(Conflict):
    """No version comes of the checkpoint at `path` until a person does something; the message says why and what."""

    code = "nothing-to-come"

    def __init__(self, model: str, path: str, state: str, reason: str) -> None:
        who = "" if state == "refused" else ", and only a person can change that"
        super().__init__(f"checkpoint {path} of {model} is {state}{who}: {reason}")
        self.model, self.path, self.state, self.reason = model, path, state, reason


class RevisionMismatch(Conflict):
    """If-Match named another revision than the row has."""

    status = 412
    code = "revision-mismatch"

    def __init__(self, what: str, expected: int, found: int) -> None:
        super().__init__(f"{what} is at revision {found}, not {expected}: read it again")
        self.expected, self.found = expected, found


class Invalid(RegistryError, ValueError):
    """A value breaks a rule; the message names both."""

    status = 422
    code = "invalid"


class Malformed(Invalid):
    """What was sent cannot be read at all: no JSON, or JSON beyond what is read; a number of thousands of digits."""

    status = 400
    code = "malformed"


class InvalidRecipe(Invalid):
    """`recipe.yaml` is wrong; the message names lines and fields."""

    code = "invalid-recipe"


class Unauthorized(RegistryError, PermissionError):
    """No token, or one that is unknown, expired, revoked or used up."""

    status = 401
    code = "unauthorized"


class Forbidden(RegistryError, PermissionError):
    """The token's role does not allow this."""

    status = 403
    code = "forbidden"


class StaleEpoch(Conflict):
    """A newer process of the same host is registered: this one is fenced and must end."""

    code = "stale-epoch"


class FencedOut(RegistryError):
    """The job's lease went to another attempt: the outcome is not recorded, nothing is lost."""

    status = 409
    code = "fenced-out"


class Unavailable(RegistryError, ConnectionError):
    """The registry or its database cannot be reached just now; retrying may cure it."""

    status = 503
    code = "unavailable"


def broken_rules(exc: ValidationError) -> str:
    """Every field that is wrong, with the rule."""
    wrong = exc.errors(include_url=False, include_context=False, include_input=False)
    return limits.cut("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong), 500)

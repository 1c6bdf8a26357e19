"""What can go wrong between a client's request and its answer. `status` is the HTTP status that says so."""

from __future__ import annotations


class HostError(Exception):
    """The root of every error of a host. `status` is the HTTP status of the answer."""

    status = 500


class BadRequest(HostError, ValueError):
    """The request breaks the Open Inference Protocol; the message names the field and the rule."""

    status = 400


class UnsupportedEncoding(BadRequest):
    """The body's Content-Encoding is none of identity, gzip and deflate."""

    status = 415


class TooLarge(BadRequest):
    """The body, or what it decompresses to, exceeds the host's cap."""

    status = 413


class OutsideContract(BadRequest):
    """Well-formed, but not what this version takes or gives; another version may."""


class TooCostly(OutsideContract):
    """Computing it would take more memory than this host gives a request; the message says how much fits."""

    status = 413


class BodyLate(HostError, TimeoutError):
    """The body stood still, and its room was given to another."""

    status = 408


class ClientLeft(HostError, ConnectionError):
    """Nobody waits for the answer any more; the status is nginx's word for it, and reaches nobody."""

    status = 499


class RouteNotFound(HostError, LookupError):
    status = 404


class MethodNotAllowed(HostError):
    """`allow`: the methods that the path takes."""

    status = 405

    def __init__(self, message: str, *allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class ModelNotFound(HostError, LookupError):
    status = 404


class VersionNotLoaded(HostError, LookupError):
    status = 404


class NotReady(HostError):
    """The version is known here but has no child that can answer now."""

    status = 503


class Overloaded(HostError):
    """More requests wait for the version's child, or more bytes are held, than the host allows."""

    status = 503


class TooMuchHeld(HostError):
    """One address's bodies hold as many bytes as it may."""

    status = 429


class ChildDied(HostError, ConnectionError):
    """The engine child ended before it came to this request."""

    status = 503


class Crashed(ChildDied):
    """The engine child ended while it computed this request."""


class DeadlineExceeded(HostError, TimeoutError):
    """No answer within the request's deadline, although the engine child was at work."""

    status = 504


class Overlong(DeadlineExceeded):
    """The engine child computed this request, and nothing else, until time was up."""


class Hung(DeadlineExceeded):
    """The engine child said nothing for the whole time that it had this request."""


class Blocked(DeadlineExceeded):
    """The engine child never came to this request: the one before it did not end."""


class ProgramFailed(HostError):
    """The program failed on this input; `own`: it fails on the reference golden's first row too."""

    def __init__(self, message: str, *, own: bool) -> None:
        super().__init__(message)
        self.own = own


class LoadFailed(HostError):
    """A version could not be brought up beside the live one; the live one is untouched."""


class GoldenFailed(LoadFailed):
    """It loaded, but its answers to the reference golden are not those that validation recorded."""

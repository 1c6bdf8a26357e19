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


class RouteNotFound(HostError, LookupError):
    status = 404


class MethodNotAllowed(HostError):
    status = 405


class ModelNotFound(HostError, LookupError):
    status = 404


class VersionNotLoaded(HostError, LookupError):
    status = 404


class NotReady(HostError):
    """The version is known here but has no child that can answer now."""

    status = 503


class Overloaded(HostError):
    """More requests wait for the version's child than the host allows."""

    status = 503


class ChildDied(HostError, ConnectionError):
    """The engine child ended while it held this request, or before it could take it."""

    status = 503


class DeadlineExceeded(HostError, TimeoutError):
    """No answer within the request's deadline."""

    status = 504


class LoadFailed(HostError):
    """A version could not be brought up beside the live one; the live one is untouched."""


class GoldenFailed(LoadFailed):
    """It loaded, but its answers to the reference golden are not those that validation recorded."""

"""By which name a server is called, and from which web page: a browser that any page may steer reaches what only this
machine or this network should. Pure.

A page can point a name of its own at our address (DNS rebinding): the Host header then carries that name. It cannot do
so with an address: whoever calls by address, a load balancer's health check as well, is let through, whichever it is
(ports are forwarded, addresses translated; nobody but the network knows them all). Nor with a name without a dot
(`host-1` in a compose file, a Kubernetes service): no public name server answers for one. No Host at all is no browser.

A page elsewhere that calls us by our own name says so in Origin. Answers carry no CORS headers.
"""

from __future__ import annotations

import ipaddress
import platform
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

_AUTHORITY = re.compile(r"(\[[0-9a-f:.%]+\]|[a-z0-9_.-]{1,253})(:[0-9]{1,5})?", re.ASCII)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_MOST_REMEMBERED = 256
_SHOWN = 100


class CallerRefused(Exception):
    """The request is none of ours to answer. `status` is the HTTP status that says so."""

    status = 403


class UnknownName(CallerRefused):
    """The Host header names another server: a stale name, a proxy that was not told, or a page that lies in wait."""

    status = 421


class AmbiguousName(CallerRefused, ValueError):
    """Two Host headers, or one that is none: who reads which of them is anybody's guess."""

    status = 400


class ForeignOrigin(CallerRefused):
    """A web page that is not this server's own made a browser send this."""


class Callers:
    """`names`: host names, `*.` before one for all below it, `*` for any; `origins`: scheme://host[:port]."""

    def __init__(self, names: Iterable[str], origins: Iterable[str] = ()) -> None:
        given = {_bare(name) for name in names if name}
        self._names = {name for name in given if not name.startswith("*")}
        self._below = tuple(name[1:] for name in given if name.startswith("*."))
        self._any = "*" in given
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._remembered: set[bytes] = set()
        """Hosts as they came that were known: nearly every request has the same one."""

    @classmethod
    def of(cls, address: str, url: str, names: Iterable[str], origins: Iterable[str]) -> Callers:
        """Of a server that listens on `address`, is reached at `url` and goes by `names` as well."""
        machine = platform.node()
        own = ("*.localhost", machine, address, urlsplit(url).hostname or "")
        return cls((*own, *names), origins)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Let the request pass, or raise UnknownName, AmbiguousName, ForeignOrigin. Names of headers are lower-case."""
        host: bytes | None = None
        origins = []
        for name, value in headers:
            if name == b"host":
                if host is not None:
                    raise AmbiguousName("more than one Host header")
                host = value
            elif name == b"origin":
                origins.append(value)
        if host is not None and host not in self._remembered:
            self._check_name(host)
        for origin in origins:
            self._check_origin(origin, host)

    def _check_name(self, host: bytes) -> None:
        found = _AUTHORITY.fullmatch(text := str(host, "latin-1").lower())
        if found is None:
            raise AmbiguousName(f"Host {text[:_SHOWN]!r} is no host name")
        if not self._knows(_bare(found[1])):
            raise UnknownName(
                f"this server does not go by the name {found[1][:_SHOWN]!r}; "
                "whoever runs it can add it to its `server_names`"
            )
        if len(self._remembered) < _MOST_REMEMBERED:
            self._remembered.add(host)

    def _knows(self, name: str) -> bool:
        return self._any or "." not in name or name in self._names or name.endswith(self._below) or _is_address(name)

    def _check_origin(self, origin: bytes, host: bytes | None) -> None:
        text = str(origin, "latin-1").lower()
        if text in self._origins:
            return
        if host is None or not _is_same(text, str(host, "latin-1").lower()):
            raise ForeignOrigin(
                f"a page of {text[:_SHOWN]!r} may not call this server; whoever runs it can add it to its `origins`"
            )


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of this origin came from where the Host header says that the request goes."""
    scheme, _, authority = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    return port is not None and authority.removesuffix(port) == host.removesuffix(port)


def _bare(name: str) -> str:
    """A host name without what does not tell two apart."""
    return name.lower().removesuffix(".").strip("[]")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

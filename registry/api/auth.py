"""Who calls, and what their role allows. Deny by default: a route that names no roles keeps the app from starting."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from weighbridge.registry import tokens
from weighbridge.registry.api import problems
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Forbidden, RegistryError, Unauthorized
from weighbridge.registry.tokens import LOCAL, Principal

_PORT: Final = re.compile(r":\d+$")

PUBLIC: Final = frozenset({"/healthz", "/readyz"})

READ: Final = frozenset({"viewer", "publisher", "approver", "admin"})
PUBLISH: Final = frozenset({"publisher", "approver", "admin"})
APPROVE: Final = frozenset({"approver", "admin"})
ADMIN: Final = frozenset({"admin"})
ENROL: Final = frozenset({"enrol", "host", "admin"})
HOST: Final = frozenset({"host", "admin"})
FETCH: Final = READ | {"host"}


class Authentication:
    """Raw ASGI: finds the principal before any route is even looked for; 401 without one, 404s and 405s included.

    On an `open` registry (bound to loopback) whoever sends no token is `tokens.LOCAL`; a token that is sent counts.
    """

    def __init__(self, app: ASGIApp, db: Database, *, open: bool) -> None:
        self._app, self._db, self._open = app, db, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            try:
                _refuse_other_pages(scope)
                scope.setdefault("state", {})["principal"] = await self._principal(scope)
            except RegistryError as error:
                return await problems.of_registry(error)(scope, receive, send)
        elif scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        return await self._app(scope, receive, send)

    async def _principal(self, scope: Scope) -> Principal:
        sent = _header(scope, b"authorization")
        if sent is None:
            if self._open:
                return _local(scope)
            raise Unauthorized("this registry wants a token: send `Authorization: Bearer …`")
        kind, _, bearer = sent.partition(" ")
        if kind.lower() != "bearer" or not bearer.strip():
            raise Unauthorized("the Authorization header holds no bearer token")
        return await run_in_threadpool(self._look_up, bearer.strip())

    def _look_up(self, bearer: str) -> Principal:
        with self._db.read() as tx:
            return tokens.authenticate(tx, bearer)


def _refuse_other_pages(scope: Scope) -> None:
    """Raise Forbidden for what a web page elsewhere makes a browser send: it would act as whoever browses."""
    origin = _header(scope, b"origin")
    if origin is not None and origin.partition("://")[2] != _header(scope, b"host"):
        raise Forbidden(f"a page of {origin[:255]} cannot call this registry")


def _local(scope: Scope) -> Principal:
    """Whoever calls an open registry by a loopback name: a page can point a name of its own at 127.0.0.1."""
    host = _header(scope, b"host") or ""
    if not is_loopback(_PORT.sub("", host).strip("[]")):
        raise Forbidden(f"this registry is open on loopback only, not as {host[:255]!r}: send a token to call it so")
    return LOCAL


def _header(scope: Scope, name: bytes) -> str | None:
    found = next((value for key, value in scope["headers"] if key == name), None)
    return None if found is None else str(found, "latin-1")


def is_loopback(host: str) -> bool:
    """Say whether an address, or a name to listen on, can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Allowed:
    """The dependency that names a route's roles, and hands it the principal."""

    def __init__(self, roles: frozenset[str]) -> None:
        self.roles = roles

    async def __call__(self, request: Request) -> Principal:
        principal: Principal = request.state.principal
        tokens.require(principal, self.roles)
        return principal


Reader = Annotated[Principal, Depends(Allowed(READ))]
Publisher = Annotated[Principal, Depends(Allowed(PUBLISH))]
Approver = Annotated[Principal, Depends(Allowed(APPROVE))]
Admin = Annotated[Principal, Depends(Allowed(ADMIN))]
Enroller = Annotated[Principal, Depends(Allowed(ENROL))]
HostItself = Annotated[Principal, Depends(Allowed(HOST))]
Fetcher = Annotated[Principal, Depends(Allowed(FETCH))]


def roles_of(route: APIRoute) -> frozenset[str]:
    """The roles that may call a route; empty when it names none."""
    calls: list[Callable[..., Any] | None] = [dependency.call for dependency in route.dependant.dependencies]
    return next((call.roles for call in calls if isinstance(call, Allowed)), frozenset())


def check_routes(app: FastAPI) -> None:
    """Refuse an app with a route that names no roles, or that is of a kind which cannot be looked into."""
    for route in app.routes:
        path = getattr(route, "path", repr(route))
        named = isinstance(route, APIRoute) and roles_of(route)
        if not named and path not in (*PUBLIC, app.openapi_url):
            raise RuntimeError(f"route {path} names no roles")


def own_host(principal: Principal, host_id: str) -> None:
    """Raise Forbidden when a host asks for another one's things."""
    if principal.role == "host" and principal.host_id != host_id:
        raise Forbidden(f"this token is of host {principal.host_id}, not of {host_id}")


def actor(principal: Principal, claimed: str = "") -> str:
    """Who did it: the token's name; on an open registry whoever the caller says they are."""
    return claimed if principal.token_id is None and claimed else principal.name

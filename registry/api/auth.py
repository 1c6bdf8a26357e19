"""Who calls, and what their role allows. Deny by default: a route that names no roles keeps the app from starting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from weighbridge.inbound.callers import CallerRefused, Callers
from weighbridge.registry import tokens
from weighbridge.registry.api import problems, sessions
from weighbridge.registry.api.forwarding import Forwarding
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Forbidden, RegistryError, Unauthorized
from weighbridge.registry.tokens import Principal

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

    It makes no difference where a call comes from: on loopback, too, there are other users and what browsers are told.
    """

    def __init__(self, app: ASGIApp, db: Database, callers: Callers, forwarding: Forwarding) -> None:
        self._app, self._db, self._callers, self._forwarding = app, db, callers, forwarding

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            try:
                self._callers.check(scope["headers"])
                self._forwarding.check(scope)
                if (once := sessions.offered(scope)) is not None:
                    answer = await run_in_threadpool(sessions.exchange, self._db, once, scope)
                    return await answer(scope, receive, send)
                scope.setdefault("state", {})["principal"] = await self._principal(scope)
            except CallerRefused as refused:
                return await problems.of_caller(refused)(scope, receive, send)
            except RegistryError as error:
                return await problems.of_registry(error)(scope, receive, send)
        elif scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        return await self._app(scope, receive, send)

    async def _principal(self, scope: Scope) -> Principal:
        sent = _header(scope, b"authorization")
        if sent is not None:
            kind, _, bearer = sent.partition(" ")
            if kind.lower() != "bearer" or not bearer.strip():
                raise Unauthorized("the Authorization header holds no bearer token")
            return await run_in_threadpool(self._look_up, bearer.strip())
        if (session := sessions.cookie(scope)) is not None:
            return await run_in_threadpool(sessions.principal, self._db, session)
        raise Unauthorized(
            "this registry wants a token: send `Authorization: Bearer …` (WEIGHBRIDGE_TOKEN), or open the address that "
            "`weighbridge token link` prints; whoever runs it finds it by itself"
        )

    def _look_up(self, bearer: str) -> Principal:
        with self._db.read() as tx:
            return tokens.authenticate(tx, bearer)


def _header(scope: Scope, name: bytes) -> str | None:
    found = next((value for key, value in scope["headers"] if key == name), None)
    return None if found is None else str(found, "latin-1")


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

"""A route that asks who calls, for what, and how much of it goes on already, before it reads a byte of a body.

FastAPI reads and parses a body first, and asks a route's dependencies after that: whoever may only look could so make
the registry parse what they like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from weighbridge import limits
from weighbridge.registry import catalog, tokens
from weighbridge.registry.api.auth import own_host, roles_of
from weighbridge.registry.api.bodies import JsonRequest
from weighbridge.registry.api.context import Context
from weighbridge.registry.errors import Malformed
from weighbridge.registry.tokens import Principal

_NUMBER = re.compile(rf"\d{{{limits.PATH + 1}}}")


class Guarded(APIRoute):
    """`APIRouter(route_class=Guarded)`: roles, then what the path names, then the body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer, roles, reads = super().get_route_handler(), roles_of(self), self.body_field is not None

        async def guarded(request: Request) -> Response:
            if not roles:  # health, which nothing may hold up
                return await answer(request)
            _refuse_digits(request)
            principal: Principal = request.state.principal
            tokens.require(principal, roles)
            context: Context = request.app.state.context
            client = principal.token_id or principal.name
            with context.calls.one(client, waits=_waits(request)):
                if not reads:
                    return await answer(request)
                await _admit(context, principal, request)
                seconds = context.settings.body_seconds
                sent = JsonRequest(request.scope, request.receive, context.held, client, seconds)
                with sent.holding():
                    await sent.read()
                    return await answer(sent)

        return guarded


def _refuse_digits(request: Request) -> None:
    """A number that is longer than any text may be is none: nobody should find out what it does where it is read."""
    sent = (request.scope["path"], str(request.query_params), *request.headers.values())
    if any(_NUMBER.search(one) for one in sent if len(one) > limits.PATH):
        raise Malformed(f"a number of more than {limits.PATH:,} digits, in the path, the query or a header")


def _waits(request: Request) -> bool:
    return request.query_params.get("wait", "0").strip("0.") != ""


async def _admit(context: Context, principal: Principal, request: Request) -> None:
    """Refuse what the path names and is not there, or not theirs. Raises Forbidden, NotFound."""
    if (host_id := request.path_params.get("host_id")) is not None:
        own_host(principal, host_id)
    if (model := request.path_params.get("model")) is not None:
        await run_in_threadpool(_find, context, model)


def _find(context: Context, model: str) -> None:
    with context.db.read() as tx:
        catalog.get(tx, model)

"""What a browser finds at the registry's address: who it is to it, and where things are. Plain HTML, no scripts.

The pages that show models and rollouts are not here yet; what is answered as JSON is linked.
"""

from __future__ import annotations

from html import escape
from typing import Final

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from weighbridge import __version__
from weighbridge.registry import hosts, schemas, tokens
from weighbridge.registry.api.auth import Reader
from weighbridge.registry.api.context import Ctx
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.api.sessions import LINK_SECONDS

router = APIRouter(tags=["browser"], route_class=Guarded)

_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_PLACES: Final = (
    ("/v1/status", "what goes on and what waits"),
    ("/v1/models", "models, their aliases and tags"),
    ("/v1/versions", "versions, with their verdicts and reasons"),
    ("/v1/checkpoints", "what lies in the bucket and is no version (yet), and why"),
    ("/v1/rollouts", "rollouts"),
    ("/v1/hosts", "hosts, with what they should hold and what they say that they hold"),
    ("/v1/events", "everything that changed, in order"),
    ("/v1/openapi.json", "the API"),
)


@router.get("/", response_class=HTMLResponse)
def front_page(ctx: Ctx, who: Reader) -> HTMLResponse:
    """Who you are to this registry, and where things are."""
    with ctx.db.read() as tx:
        count = hosts.count(tx)
    places = "".join(f'<li><a href="{path}">{path}</a>: {escape(what)}</li>' for path, what in _PLACES)
    return HTMLResponse(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Weighbridge</title></head><body>'
        f"<h1>Weighbridge {escape(__version__)}</h1>"
        f"<p>You are {escape(who.name)}, as {escape(who.role)}: this session reads, and ends by itself.</p>"
        f"<p>Hosts: {count}.</p><ul>{places}</ul>"
        "<p>To change something use <code>weighbridge --help</code> or the API with a token.</p>"
        "</body></html>",
        headers=_HEADERS,
    )


@router.post("/v1/sessions", status_code=201)
def create_link(ctx: Ctx, who: Reader) -> schemas.NewToken:
    """A one-time token for a browser: `GET /?token=…` exchanges it for a session that reads in the caller's name."""
    with ctx.change() as tx:
        return schemas.NewToken(token=tokens.link(tx, who, LINK_SECONDS))

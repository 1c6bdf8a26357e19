"""A browser's way in: an address with a one-time token, exchanged for a session that can only read.

The session is a cookie that no script can read and no other site's page sends. What changes something wants a token in
the header, so that no page can make a browser do it.
"""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import parse_qs

from starlette.responses import RedirectResponse, Response
from starlette.types import Scope

from weighbridge.registry import tokens
from weighbridge.registry.db import Database
from weighbridge.registry.tokens import Principal

LINK_SECONDS: Final = 3600.0
"""How long an address waits for its browser."""
SESSION_SECONDS: Final = 8 * 3600
"""How long a browser stays signed in: a day's work."""
_SAFE: Final = frozenset({"GET", "HEAD"})


def offered(scope: Scope) -> str | None:
    """The one-time token that a request for the front page carries."""
    if scope["path"] != "/" or scope["method"] != "GET":
        return None
    offers = parse_qs(scope["query_string"].decode("latin-1")).get("token")
    return offers[0] if offers else None


def exchange(db: Database, once: str, scope: Scope) -> Response:
    """Sign the browser in, and send it to the front page, without the token in its address. Raises Unauthorized."""
    with db.transaction() as tx:
        session = tokens.open_session(tx, once, SESSION_SECONDS)
    answer = RedirectResponse("/", 303, headers={"cache-control": "no-store", "referrer-policy": "no-referrer"})
    secure = scope["scheme"] == "https"
    answer.set_cookie(_name(scope), session, SESSION_SECONDS, httponly=True, samesite="strict", secure=secure)
    return answer


def cookie(scope: Scope) -> str | None:
    """The session that a browser's request carries; None for what is no safe method, whatever it carries."""
    if scope["method"] not in _SAFE:
        return None
    for key, value in scope["headers"]:
        if key == b"cookie" and (found := _morsel(value.decode("latin-1"), _name(scope))):
            return found
    return None


def principal(db: Database, session: str) -> Principal:
    """Whose session it is. Raises Unauthorized."""
    with db.read() as tx:
        return tokens.in_session(tx, session)


def _name(scope: Scope) -> str:
    """The cookie's name: a browser sends cookies to every port of a machine, and several registries may run on one."""
    server = scope.get("server") or ("", 0)
    return f"weighbridge-{server[1] or 0}"


def _morsel(header: str, name: str) -> str | None:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return None
    return found.value if found else None

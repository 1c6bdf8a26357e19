"""How much a caller may send: JSON is held in memory, so it has a limit. Uploads stream, and check their own."""

from __future__ import annotations

from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_JSON: Final = 16 << 20
"""Bytes; the parameters of a template with 100,000 tensors fit."""
STREAMED: Final = "/v1/blobs/"


class LimitedBodies:
    """Raw ASGI: 413 for a longer body, whether it says its length or not."""

    def __init__(self, app: ASGIApp, *, largest: int = MAX_JSON) -> None:
        self._app, self._largest = app, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(STREAMED):
            return await self._app(scope, receive, send)
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._largest:
                raise HTTPException(413, f"a body has at most {self._largest:,} bytes")
            return message

        return await self._app(scope, limited, send)

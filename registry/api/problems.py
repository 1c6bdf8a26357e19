"""Every error as RFC 9457 problem details, with the registry's stable codes and without internals."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from weighbridge import limits
from weighbridge.inbound.callers import CallerRefused
from weighbridge.registry.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    RegistryError,
    Unauthorized,
    Unavailable,
)
from weighbridge.registry.lifecycle import IllegalTransition
from weighbridge.registry.schemas import Problem
from weighbridge.storage import errors as storage

logger = logging.getLogger(__name__)

_CODES = {
    401: Unauthorized.code,
    403: Forbidden.code,
    404: NotFound.code,
    405: "method-not-allowed",
    408: "too-slow",
    413: "too-large",
    422: Invalid.code,
}
_STORAGE: tuple[tuple[type[storage.StorageError], int, str], ...] = (
    (storage.ObjectNotFound, NotFound.status, NotFound.code),
    (storage.DigestMismatch, Invalid.status, Invalid.code),
    (storage.PreconditionFailed, Conflict.status, Conflict.code),
    (storage.StorageFull, HTTPStatus.INSUFFICIENT_STORAGE, "storage-full"),
)


def problem(
    status: int, code: str, detail: str, *, data: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> Response:
    """A problem response. `about:blank`: the title is the HTTP status's own, `code` tells more."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, code=code, data=data or {})
    sent = dict(headers or {})
    if status == Unauthorized.status:
        sent["www-authenticate"] = "Bearer"
    if status == Unavailable.status:
        sent["retry-after"] = "1"
    return JSONResponse(
        body.model_dump(mode="json"), status_code=status, headers=sent, media_type="application/problem+json"
    )


def plain(status: int, detail: str) -> tuple[bytes, bytes]:
    """(content type, body) of a problem that is answered before there is a request."""
    code = _CODES.get(status, Unavailable.code if status == Unavailable.status else "http-error")
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, code=code)
    return b"application/problem+json", body.model_dump_json().encode()


def of_registry(error: RegistryError) -> Response:
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, Unavailable):
        logger.error("a call failed", exc_info=error)
        return internal()
    data = {key: value for key, value in vars(error).items() if isinstance(value, str | int | float | list)}
    return problem(error.status, error.code, str(error), data=data)


def of_caller(refused: CallerRefused) -> Response:
    """What was sent to another name, or by a page that is not ours."""
    return problem(refused.status, _CODES.get(refused.status, "caller-refused"), str(refused))


def internal() -> Response:
    """What went wrong is in the log, not in the answer."""
    return problem(500, RegistryError.code, "the registry failed at this call; its log says where")


def add_handlers(app: FastAPI) -> None:
    """Answer every exception that leaves a route."""
    app.add_exception_handler(RegistryError, _on_registry)
    app.add_exception_handler(storage.StorageError, _on_storage)
    app.add_exception_handler(IllegalTransition, _on_transition)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(DataError, _on_value)
    app.add_exception_handler(OverflowError, _on_value)


async def _on_registry(request: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryError)
    return of_registry(error)


async def _on_storage(request: Request, error: Exception) -> Response:
    for kind, status, code in _STORAGE:
        if isinstance(error, kind):
            return problem(status, code, str(error))
    logger.warning("the artifact store fails: %s", error)
    return problem(Unavailable.status, Unavailable.code, f"the artifact store does not answer: {error}")


async def _on_transition(request: Request, error: Exception) -> Response:
    return problem(Conflict.status, Conflict.code, str(error))


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return problem(Invalid.status, Invalid.code, limits.prose(wrong))


async def _on_value(request: Request, error: Exception) -> Response:
    """What only the database noticed; NUL characters and numbers of more than 64 bits get this far."""
    logger.info("%s %s: %s", request.method, request.url.path, error)
    return problem(Invalid.status, Invalid.code, "a value is out of range, too long, or holds a NUL character")


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http-error")
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return problem(error.status_code, code, detail, headers=dict(error.headers or {}))


class LastResort:
    """The outermost layer, raw ASGI: what no handler knows is logged and answered without internals."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if scope["type"] != "http":
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:  # Cut the connection: half an answer must not look whole.
                raise
            await internal()(scope, receive, send)

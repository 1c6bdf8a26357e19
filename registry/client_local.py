"""The client's way to a registry of this user on this machine: by its socket, with the token that it left.

Which registry that is, is asked again whenever the one of before does not answer: it may come later than the client,
and be another one after it was away.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx

from weighbridge.registry import local
from weighbridge.registry.local import Local
from weighbridge.storage import private

Look = Callable[[], Local | None]


class LocalTransport(httpx.BaseTransport):
    """Sends requests by the socket of the registry that `look` finds; with `lend`, with the token that it left.

    `otherwise` is where requests go while there is none; None: they fail. No token that was found ever goes there.
    """

    def __init__(self, look: Look, *, lend: bool, otherwise: Callable[[], httpx.BaseTransport] | None = None) -> None:
        self._look, self._lend, self._otherwise = look, lend, otherwise
        self._elsewhere: httpx.BaseTransport | None = None
        self._known: tuple[Local, str | None] | None = None
        self._by_socket: tuple[Path, httpx.HTTPTransport] | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        known = self._known or self._find()
        if known is None:
            if self._otherwise is None:
                raise httpx.ConnectError("none has begun on its data folder", request=request)
            self._elsewhere = self._elsewhere or self._otherwise()
            return self._elsewhere.handle_request(request)
        found, token = known
        try:
            answer = self._open(found).handle_request(_for_socket(request, token))
        except httpx.TransportError:
            self._known = None
            raise
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            self._known = None  # its token may be another one by now
        return answer

    def close(self) -> None:
        if self._by_socket is not None:
            self._by_socket[1].close()
        if self._elsewhere is not None:
            self._elsewhere.close()

    def _find(self) -> tuple[Local, str | None] | None:
        found = self._look()
        if found is not None:
            self._known = (found, found.token() if self._lend else None)
        return self._known

    def _open(self, found: Local) -> httpx.HTTPTransport:
        if not (private.is_folder_ours(found.socket.parent) and private.is_ours(found.socket)):
            raise httpx.ConnectError(f"the one of {found.data} does not run")
        if self._by_socket is None or self._by_socket[0] != found.socket:
            # There is no TLS to verify.
            self._by_socket = (found.socket, httpx.HTTPTransport(uds=str(found.socket), verify=False))
        return self._by_socket[1]


def _for_socket(request: httpx.Request, token: str | None) -> httpx.Request:
    """The same request, with the token. The one that was given stays without: it may be sent elsewhere next time."""
    headers = httpx.Headers(request.headers)
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    url = request.url.copy_with(scheme="http")  # a socket of this machine needs no TLS
    return httpx.Request(request.method, url, headers=headers, stream=request.stream, extensions=request.extensions)


def transport_for(url: str, data: Path | None, *, lend: bool) -> LocalTransport | None:
    """The transport for what has an address alone, or a data folder; None where nothing local can be meant."""
    if data is not None:
        return LocalTransport(lambda: local.of(data), lend=lend)
    if lend and (local.is_loopback(httpx.URL(url).host) or local.find(url) is not None):
        return LocalTransport(lambda: local.find(url), lend=True, otherwise=httpx.HTTPTransport)
    return None

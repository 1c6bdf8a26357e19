"""The client's wire: one request with retries where they do no harm, and problems revived as the registry's errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import tenacity
from pydantic import BaseModel, TypeAdapter, ValidationError

from weighbridge.registry import client_local
from weighbridge.registry.errors import Invalid, RegistryError, Unauthorized, Unavailable, broken_rules
from weighbridge.registry.schemas import Page

T = TypeVar("T", bound=BaseModel)
Item = TypeVar("Item", bound=BaseModel)

_IDEMPOTENT: Final = frozenset({"GET", "PUT", "DELETE"})
_GATEWAY: Final = frozenset({502, 503, 504})
_ATTEMPTS: Final = 4


def patiently(seconds: float | None = None) -> tenacity.Retrying:
    """Try again while the registry cannot be reached: for so many seconds, or for ever."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        stop=tenacity.stop_never if seconds is None else tenacity.stop_after_delay(seconds),
        reraise=True,
    )


class Http:
    """Requests to one registry. Thread-safe. `timeout`: seconds to connect, and between two reads or writes.

    `data`: the data folder of a registry of this user. Without it, and without a token, one is found by `url`.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        timeout: float,
        transport: httpx.BaseTransport | None,
        data: Path | None = None,
    ) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        local = client_local.transport_for(self.url, data, lend=not token) if transport is None else None
        self._client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=timeout,
            transport=transport,
            # Other addresses, such as those of presigned blobs, are called as they are.
            mounts={f"all://{httpx.URL(self.url).netloc.decode()}": local} if local else None,
            follow_redirects=True,  # Presigned blobs; httpx drops the token when the host is another.
        )

    def close(self) -> None:
        self._client.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: Mapping[str, Any] | None = None,
        revision: int | None = None,
        wait: float = 0.0,
    ) -> httpx.Response:
        """One call, retried where a second one does no harm. `wait`: seconds that the registry may take on purpose.

        Raises the RegistryError that the registry answered; Unavailable when it cannot be reached.
        """
        headers = {} if revision is None else {"if-match": f'"{revision}"'}
        if body is not None:
            headers["content-type"] = "application/json"
        request = self._client.build_request(
            method,
            path,
            content=None if body is None else body.model_dump_json().encode(),
            params={key: value for key, value in (params or {}).items() if value is not None},
            headers=headers,
            timeout=httpx.Timeout(self.timeout, read=self.timeout + wait),
        )
        attempts = _ATTEMPTS if method in _IDEMPOTENT else 1
        retrying = patiently().copy(stop=tenacity.stop_after_attempt(attempts))
        return retrying(self._once, request)

    def get(self, answer: type[T], path: str, /, **params: Any) -> T:
        return answer.model_validate_json(self.send("GET", path, params=params).content)

    def get_list(self, item: type[Item], path: str) -> list[Item]:
        """An answer that is one list."""
        kind: TypeAdapter[list[Item]] = TypeAdapter(list[item])  # type: ignore[valid-type]
        return kind.validate_json(self.send("GET", path).content)

    def pages(self, item: type[Item], path: str, /, **params: Any) -> Iterator[Item]:
        """Every item of a listing; a page is fetched when the one before it is used up."""
        page_type = Page[item]  # type: ignore[valid-type]
        after: str | None = None
        while True:
            page = self.get(page_type, path, **params, after=after)
            yield from page.items
            if page.next is None:
                return
            after = page.next

    @contextlib.contextmanager
    def stream(self, path: str, *, start: int = 0) -> Iterator[httpx.Response]:
        """Open an answer's bytes from `start` on; 416: there are none. Raises Unavailable, also on the way."""
        headers = {"range": f"bytes={start}-"} if start else {}
        with self._translated(), self._client.stream("GET", path, headers=headers) as response:
            if not (start and response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE):
                if response.is_error:
                    response.read()
                _check(response)
            yield response

    def upload(self, path: str, chunks: Iterator[bytes], size: int) -> None:
        """PUT a body of `size` bytes without holding it whole."""
        with self._translated():
            _check(self._client.put(path, content=chunks, headers={"content-length": str(size)}))

    def _once(self, request: httpx.Request) -> httpx.Response:
        with self._translated():
            response = self._client.send(request)
        _check(response)
        return response

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as exc:
            raise Unavailable(
                f"no answer from the registry at {self.url} ({exc or type(exc).__name__}): "
                "check that `weighbridge registry` or `weighbridge up` runs there, or set WEIGHBRIDGE_URL"
            ) from exc


def sent(kind: type[T], **values: Any) -> T:
    """What is to be sent, by the registry's own rules. Raises Invalid naming every field that breaks one."""
    try:
        return kind(**values)
    except ValidationError as exc:
        raise Invalid(broken_rules(exc)) from exc


def _all(cls: type[RegistryError]) -> Iterator[type[RegistryError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _all(below)


_BY_CODE: Final = {cls.code: cls for cls in _all(RegistryError)}


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        problem = json.loads(response.content)
        raise _revived(_BY_CODE.get(problem["code"], RegistryError), problem["detail"], problem.get("data", {}))
    # Not the registry's own words: a proxy, or another server on this port.
    said = f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
    if response.status_code in _GATEWAY:
        raise Unavailable(f"{said}: the registry behind it does not answer")
    if response.status_code == Unauthorized.status:
        raise Unauthorized(said)
    raise RegistryError(f"{said}, which no Weighbridge registry says: check the URL")


def _revived(cls: type[RegistryError], detail: str, data: Mapping[str, Any]) -> RegistryError:
    """The same error as in the registry, whose constructor would put its own words again."""
    error = cls.__new__(cls, detail)
    vars(error).update(data)
    return error

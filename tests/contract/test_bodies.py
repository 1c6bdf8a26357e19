"""Before a body is read it is known who sends it and for what; then it is read by a budget, and given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fixtures.api import Api, Start, sqlite_only

from weighbridge.registry.api import bodies

JSON = {"content-type": "application/json"}
pytestmark = sqlite_only


class Sender:
    """One raw ASGI call whose body comes part by part; `read` counts the parts that were asked for."""

    def __init__(self, api: Api, method: str, path: str, token: str | None, *parts: bytes, **headers: str) -> None:
        self.read, self._parts = 0, parts
        named = {"host": "127.0.0.1", **JSON, **headers}
        if token is not None:
            named["authorization"] = f"Bearer {token}"
        self._scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()],
            "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9),
            "root_path": "", "asgi": {"version": "3.0"}, "state": {},
        }  # fmt: skip
        self.sent: list[dict[str, Any]] = []
        api.portal.call(self._call, api.app)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    async def _call(self, app: Any) -> None:
        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        await app(self._scope, self._receive, send)

    async def _receive(self) -> dict[str, Any]:
        if self.read == len(self._parts):
            await asyncio.Event().wait()  # the rest never comes
        self.read += 1
        return {"type": "http.request", "body": self._parts[self.read - 1], "more_body": True}


@pytest.mark.parametrize("role", ["viewer", "publisher", "approver", "host"])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/templates"), ("POST", "/v1/tokens"), ("PUT", f"/v1/blobs/{'0' * 64}")]
)
def test_who_may_not_is_refused_before_the_body_is_read(closed_api: Api, role: str, method: str, path: str) -> None:
    """16 MB of JSON from somebody who may only look are never parsed: not a byte of them is asked for."""
    token = closed_api.token(role, host_id="h1" if role == "host" else None)
    sender = Sender(closed_api, method, path, token, b"[" * (16 << 20))
    assert (sender.status, sender.read) == (403, 0)


def test_without_a_token_nothing_is_read(closed_api: Api) -> None:
    """Nor from whoever has none."""
    sender = Sender(closed_api, "POST", "/v1/templates", None, b"[" * (16 << 20))
    assert (sender.status, sender.read) == (401, 0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v1/models/nobody/tags/k", 404),
        ("PUT", "/v1/models/nobody/aliases/a", 404),
        ("POST", "/v1/models/nobody/versions/1/archive", 404),
        ("POST", "/v1/nothing", 404),
        ("PATCH", "/v1/models", 405),
    ],
)
def test_what_is_named_must_be_there_before_the_body_is_read(
    closed_api: Api, method: str, path: str, status: int
) -> None:
    """A model that nobody has, a path that is none, a method that it has not."""
    sender = Sender(closed_api, method, path, closed_api.token("admin"), b"{" * 100)
    assert (sender.status, sender.read) == (status, 0)


def test_a_host_is_refused_for_another_before_the_body_is_read(closed_api: Api) -> None:
    """A report for somebody else is none of its business, however large."""
    mine, other = closed_api.host("a"), closed_api.host("b")
    sender = Sender(closed_api, "PUT", f"/v1/hosts/{other.id}/observed", mine.token, b"{" * 100)
    assert (sender.status, sender.read) == (403, 0)


@pytest.mark.parametrize(
    ("method", "path", "most"),
    [("POST", "/v1/tokens", bodies.MAX_JSON), ("POST", "/v1/templates", bodies.MAX_TEMPLATE)],
)
def test_a_body_that_is_too_long_is_refused_by_what_it_says_or_at_the_first_byte_too_many(
    closed_api: Api, method: str, path: str, most: int
) -> None:
    """413, and the connection ends, since nobody reads the rest."""
    token = closed_api.token("admin")
    said = Sender(closed_api, method, path, token, b"x", content_length=f"{most + 1}")
    came = Sender(closed_api, method, path, token, b"x" * most, b"x", b"x")
    assert [(one.status, one.read, one.headers[b"connection"]) for one in (said, came)] == [
        (413, 0, b"close"),
        (413, 2, b"close"),
    ]


def test_a_body_that_does_not_come_is_not_waited_for(start_api: Start) -> None:
    """Forty that hold back a last byte hold nothing after the deadline."""
    api = start_api(host="0.0.0.0", body_seconds=0.05)
    token = api.token("admin")
    for _ in range(40):
        sender = Sender(api, "POST", "/v1/tokens", token, b'{"role": "viewer', content_length="18")
        assert (sender.status, sender.headers[b"connection"]) == (408, b"close")
    assert len(api.app.state.context.held) == 0


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 20, "-1", "1_0", "x", "٣"])
def test_a_length_that_is_no_number_of_bytes_is_400(closed_api: Api, length: str) -> None:
    """Of an upload as well."""
    token = closed_api.token("admin")
    for method, path in (("POST", "/v1/tokens"), ("PUT", f"/v1/blobs/{'0' * 64}")):
        assert Sender(closed_api, method, path, token, b"{}", content_length=length).status == 400


HOSTILE = {
    "digits": b'{"role": "viewer", "ttl": %s}' % (b"9" * 5000),
    "fraction's digits": b'{"role": "viewer", "ttl": 1e%s}' % (b"9" * 5000),
    "beyond floats": b'{"role": "viewer", "ttl": 1e400}',
    "Infinity": b'{"role": "viewer", "ttl": Infinity}',
    "NaN": b'{"role": "viewer", "ttl": NaN}',
    "deep": b'{"role":' + b"[" * 100_000,
    "deep and whole": b'{"role":' + b"[" * 300 + b"]" * 300 + b"}",
    "objects": b'{"role": [%s]}' % (b"{}," * 330_000 + b"{}"),
    "numbers": b'{"role": [%s]}' % (b"1," * 500_000 + b"1"),
    "twice": b'{"role": "viewer", "role": "admin"}',
    "list": b"[]",
    "not UTF-8": b'{"role": "\xff"}',
    "broken off": b'{"role": "vie',
    "empty": b" ",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_json_that_costs_much_or_means_nothing_is_400(closed_api: Api, kind: str) -> None:
    """Numbers of thousands of digits, infinities, nesting, a value for every other byte, a key twice."""
    answer = closed_api.http(closed_api.token("admin")).post("/v1/tokens", content=HOSTILE[kind], headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("DELETE", "/v1/models/digits/aliases/a", {"if-match": '"%s"'}),
        ("GET", "/v1/blobs/" + "0" * 64, {"range": "bytes=%s-"}),
        ("GET", "/v1/blobs/" + "0" * 64, {"range": "bytes=0-%s"}),
        ("GET", "/v1/rollouts/%s", {}),
        ("DELETE", "/v1/tokens/%s", {}),
        ("GET", "/v1/versions?after=%s", {}),
        ("GET", "/v1/versions?limit=%s", {}),
        ("GET", "/v1/events?after=0&wait=%s", {}),
        ("GET", "/v1/events?after=0&wait=0.%s", {}),
    ],
)
@pytest.mark.parametrize("digits", ["9" * 5000, "0" * 4000 + "1"], ids=["nines", "zeros"])
def test_numbers_of_5000_digits_are_400(
    closed_api: Api, digits: str, method: str, path: str, headers: dict[str, str]
) -> None:
    """In a header, a path, a query: never a failure of the registry."""
    sent = {name: value.replace("%s", digits).encode() for name, value in headers.items()}
    answer = closed_api.http(closed_api.token("admin")).request(method, path.replace("%s", digits), headers=sent)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")
    assert len(answer.content) < 1000


def test_ordinary_json_is_taken(closed_api: Api) -> None:
    """A template of 100,000 parameters, which is the largest that anybody sends."""
    parameters = {f"model.layers.{number}.weight": {"shape": [64, 64], "dtype": "F32"} for number in range(100_000)}
    body = {
        "name": "large", "digest": closed_api.blobs.put_bytes(b"pt2").digest, "fingerprint": "f",
        "parameters": parameters, "inputs": [], "outputs": [],
    }  # fmt: skip
    answer = closed_api.http(closed_api.token("admin")).post("/v1/templates", json=body)
    assert answer.status_code == 201
    assert len(answer.json()["parameters"]) == 100_000


def test_a_call_that_fails_gives_its_turn_back(start_api: Start) -> None:
    """Refused bodies and roles, errors and answers all end a call: the next hundred find their turn."""
    api = start_api(host="0.0.0.0", calls=4)
    admin, viewer = api.http(api.token("admin")), api.http(api.token("viewer"))
    for _ in range(20):
        assert viewer.post("/v1/tokens", json={}).status_code == 403
        assert admin.post("/v1/tokens", content=b"{", headers=JSON).status_code == 400
        assert admin.get("/v1/models/nobody").status_code == 404
        assert viewer.get("/v1/status").status_code == 200

"""Who may call what: every route, every role, every host, and what never gets in."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.routing import APIRoute
from fixtures.api import Api, Start, assign, put_ready, sqlite_only

from weighbridge.registry import tokens
from weighbridge.registry.api.auth import roles_of
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.errors import Conflict, Forbidden, StaleEpoch, Unauthorized
from weighbridge.registry.schemas import Enrolment, Observed
from weighbridge.registry.tokens import ROLES

READ = {"viewer", "publisher", "approver", "admin"}
PUBLISH = READ - {"viewer"}
APPROVE = PUBLISH - {"publisher"}
ADMIN = {"admin"}

ROUTES: dict[tuple[str, str], set[str]] = {
    ("GET", "/v1/models"): READ,
    ("GET", "/v1/models/{model}"): READ,
    ("GET", "/v1/models/{model}/aliases"): READ,
    ("PUT", "/v1/models/{model}/aliases/{alias}"): APPROVE,
    ("DELETE", "/v1/models/{model}/aliases/{alias}"): APPROVE,
    ("PUT", "/v1/models/{model}/tags/{key}"): PUBLISH,
    ("DELETE", "/v1/models/{model}/tags/{key}"): PUBLISH,
    ("PUT", "/v1/models/{model}/versions/{selector}/tags/{key}"): PUBLISH,
    ("DELETE", "/v1/models/{model}/versions/{selector}/tags/{key}"): PUBLISH,
    ("GET", "/v1/versions"): READ,
    ("GET", "/v1/models/{model}/versions/{selector}"): READ,
    ("GET", "/v1/models/{model}/versions/{selector}/variants/{name}/tensors"): READ,
    ("GET", "/v1/models/{model}/versions/{selector}/benchmarks"): READ,
    ("GET", "/v1/models/{model}/versions/{selector}/choices"): READ,
    ("POST", "/v1/models/{model}/versions/{selector}/benchmarks/retry"): APPROVE,
    ("POST", "/v1/benchmarks"): APPROVE,
    ("GET", "/v1/workers"): READ,
    ("POST", "/v1/models/{model}/versions/{selector}/rejudge"): PUBLISH,
    ("GET", "/v1/models/{model}/versions/{selector}/archive"): APPROVE,
    ("POST", "/v1/models/{model}/versions/{selector}/archive"): APPROVE,
    ("POST", "/v1/models/{model}/versions/{selector}/unarchive"): APPROVE,
    ("GET", "/v1/events"): READ,
    ("GET", "/v1/checkpoints"): READ,
    ("GET", "/v1/status"): READ,
    ("GET", "/v1/policies"): READ,
    ("GET", "/v1/store"): PUBLISH,
    ("GET", "/"): READ,
    ("POST", "/v1/sessions"): READ,
    ("GET", "/v1/rollouts"): READ,
    ("GET", "/v1/rollouts/{rollout_id}"): READ,
    ("POST", "/v1/rollouts"): APPROVE,
    ("POST", "/v1/rollouts/{rollout_id}/{verb}"): APPROVE,
    ("GET", "/v1/hosts"): READ,
    ("GET", "/v1/hosts/{host_id}"): READ,
    ("POST", "/v1/hosts"): {"enrol", "host", "admin"},
    ("GET", "/v1/hosts/{host_id}/desired"): {"host", "admin"},
    ("PUT", "/v1/hosts/{host_id}/observed"): {"host", "admin"},
    ("POST", "/v1/hosts/{host_id}/retire"): ADMIN,
    ("GET", "/v1/blobs/{digest}"): READ | {"host"},
    ("PUT", "/v1/blobs/{digest}"): ADMIN,
    ("GET", "/v1/templates"): READ,
    ("GET", "/v1/templates/{name}"): READ,
    ("POST", "/v1/templates"): ADMIN,
    ("GET", "/v1/tokens"): ADMIN,
    ("POST", "/v1/tokens"): ADMIN,
    ("DELETE", "/v1/tokens/{token_id}"): ADMIN,
}
"""Who may call each route. A new route belongs here."""
PUBLIC = {("GET", "/healthz"), ("GET", "/readyz")}

BODIES: dict[tuple[str, str], dict[str, object]] = {
    ("PUT", "/v1/models/{model}/aliases/{alias}"): {"version": 1},
    ("POST", "/v1/rollouts"): {"model": "nobody"},
    ("POST", "/v1/hosts"): {"name": "h", "id": "h1"},
    ("PUT", "/v1/hosts/{host_id}/observed"): {"epoch": 1, "models": []},
    ("POST", "/v1/tokens"): {"role": "viewer"},
}


def declared(api: Api) -> dict[tuple[str, str], set[str]]:
    routes = [route for route in api.app.routes if isinstance(route, APIRoute)]
    return {(method, route.path): set(roles_of(route)) for route in routes for method in route.methods}


def filled(path: str) -> str:
    names = {
        "digest": "0" * 64,
        "rollout_id": "77",
        "token_id": "77",
        "verb": "pause",
        "host_id": "h1",
        "selector": "9",
    }
    return re.sub(r"\{(\w+)\}", lambda found: names.get(found[1], "nobody"), path)


@pytest.fixture(params=["0.0.0.0", "127.0.0.1", "::1"])
def anywhere(request: pytest.FixtureRequest, start_api: Start) -> Api:
    """A registry on every kind of address, loopback included: who sends no token has none."""
    return start_api(host=request.param)


@sqlite_only
def test_no_route_reads_a_body_before_it_asks_for_the_role(closed_api: Api) -> None:
    """Every route but health is one that refuses first; a new router that forgets is found here."""
    routes = [route for route in closed_api.app.routes if isinstance(route, APIRoute)]
    plain = {route.path for route in routes if not isinstance(route, Guarded)}
    assert plain <= {path for _, path in PUBLIC}


@sqlite_only
def test_every_route_names_its_roles(closed_api: Api) -> None:
    """The table above is whole: no route is there that it does not know, and none has other roles."""
    assert {key: roles for key, roles in declared(closed_api).items() if key not in PUBLIC} == ROUTES


@sqlite_only
def test_without_a_token_every_method_of_every_path_is_401(anywhere: Api) -> None:
    """Also unknown paths, wrong methods and the API's own description: whoever has no token learns nothing."""
    http = anywhere.http()
    paths = {filled(path) for _, path in ROUTES} | {"/", "/v1", "/v1/nothing", "/v1/openapi.json", "/docs", "/metrics"}
    for path in paths:
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            answer = http.request(method, path)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/problem+json"
    for _, path in PUBLIC:
        assert http.get(path).status_code == 200


@sqlite_only
@pytest.mark.parametrize(
    "sent", ["Bearer wrong", "Bearer ", "Basic YTpi", "Bearer \N{LATIN SMALL LETTER Y WITH DIAERESIS}", "wb_x"]
)
def test_what_is_no_token_is_401(closed_api: Api, sent: str) -> None:
    """Unknown tokens and other schemes do not get in."""
    headers = {"authorization": sent.encode("latin-1")}
    assert closed_api.http().get("/v1/models", headers=headers).status_code == 401


@sqlite_only
@pytest.mark.parametrize("role", ROLES)
def test_roles(anywhere: Api, role: str) -> None:
    """A role may call its routes and gets 403 from all others, whatever is in the call, on loopback too."""
    for (method, path), allowed in ROUTES.items():
        http = anywhere.http(anywhere.token(role, host_id="h1" if role in ("host", "enrol") else None))
        answer = http.request(method, filled(path), json=BODIES.get((method, path), {}))
        if role in allowed:
            assert answer.status_code != 401, (method, path)
            fenced_off = role == "host" and path.startswith("/v1/blobs")  # that one is not part of its assignments
            assert (answer.status_code == 403) == fenced_off, (method, path, answer.text)
        else:
            assert answer.status_code == 403, (method, path)
            assert answer.json()["code"] == "forbidden"


@sqlite_only
def test_hosts_see_only_their_own(closed_api: Api) -> None:
    """Host A reads neither B's assignments nor blobs of them, and cannot speak for B; its own it gets."""
    a, b = closed_api.host("a"), closed_api.host("b")
    slot = assign(closed_api, b.id, put_ready(closed_api))
    client_a, client_b = closed_api.client(a.token), closed_api.client(b.token)
    assert client_b.desired(b.id).models[0].slots == [slot]
    assert client_b.blob(slot.artifact)
    for forbidden in (
        lambda: client_a.desired(b.id),
        lambda: client_a.observed(b.id, Observed(epoch=1, models=[])),
        lambda: client_a.blob(slot.artifact),
        lambda: client_a.enrol(Enrolment(id=b.id, name="a")),
        lambda: client_a.host(a.id),
        lambda: client_a.status(),
    ):
        with pytest.raises(Forbidden):
            forbidden()


@sqlite_only
def test_a_host_learns_not_whether_a_blob_exists(closed_api: Api) -> None:
    """A blob of others and one that nobody has look the same to a host."""
    http = closed_api.http(closed_api.host().token)
    there = closed_api.blobs.put_bytes(b"of others").digest
    assert http.get(f"/v1/blobs/{there}").status_code == http.get(f"/v1/blobs/{'0' * 64}").status_code == 403


ODD = [
    "/v1/blobs/../../etc/passwd",
    "/v1/blobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/v1/blobs/%252e%252e%252fetc",
    "/v1/blobs/..%5c..%5cetc",
    "/v1/blobs/" + "A" * 64,
    "/v1/blobs/" + "0" * 63,
    "/v1/blobs/" + "0" * 64 + "%00",
    "/v1/blobs//" + "0" * 64,
    "/v1/models/..%2f..%2fetc",
    "/v1/models/%00",
    "/v1/models/a%2e%2e/versions/..%2f1",
    "/v1/models/digits/versions/%00",
    "/v1/models/digits/versions/-1",
    "/v1/models/digits/versions/99999999999999999999",
    "/v1/hosts/..%2f..%2fx",
    "/v1/hosts/%00",
    "/v1/templates/%00",
    "/v1/rollouts/99999999999999999999",
    "/v1/versions?after=-1",
    "/v1/versions?after=99999999999999999999",
    "/v1/versions?model=%00",
    "/v1/versions?limit=0",
    "/v1/events?wait=1e9",
    "/v1/events?wait=nan",
]


def test_paths_and_values_that_lead_elsewhere_are_4xx(api: Api) -> None:
    """No name, digest or number leads out of what it names, and none makes the registry fail."""
    http = api.http()
    for path in ODD:
        answer = http.get(path)
        assert 400 <= answer.status_code < 500 or answer.json().get("items") == [], path
        assert answer.status_code == 200 or answer.headers["content-type"] == "application/problem+json"


def test_tokens_live_until_revoked(closed_api: Api) -> None:
    """A token is shown once, kept as a hash, and ends at once when it is revoked."""
    admin = closed_api.client(closed_api.token("admin"))
    bearer = admin.create_token("viewer", "eyes", ttl=60)
    viewer = closed_api.client(bearer)
    assert viewer.status().models == 0
    row = next(admin.tokens())
    assert (row.role, row.name, row.revoked_at) == ("viewer", "eyes", None)
    assert row.expires_at is not None
    assert bearer not in closed_api.http(closed_api.token("admin")).get("/v1/tokens").text
    admin.revoke_token(row.id)
    with pytest.raises(Unauthorized):
        viewer.status()
    with pytest.raises(ValueError, match="no role 'god'"):
        admin.create_token("god")


def test_tokens_expire(closed_api: Api) -> None:
    """After its time a token is unknown, by the database's clock."""
    bearer = closed_api.token("admin", ttl=1e-9)
    with pytest.raises(Unauthorized):
        closed_api.client(bearer).status()
    with closed_api.db.read() as tx:
        assert not tokens.has_admin(tx)


def test_an_enrolment_token_is_used_once(closed_api: Api) -> None:
    """Of many that race with one enrolment token one becomes a host; the host's own token is what it goes on with."""
    bearer = closed_api.token("enrol")

    def enrol(number: int) -> object:
        try:
            return closed_api.client(bearer).enrol(Enrolment(name=f"h{number}"))
        except Unauthorized as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(enrol, range(4)))
    won = [answer for answer in answers if not isinstance(answer, Unauthorized)]
    assert len(won) == 1
    assert [host.name for host in closed_api.client(closed_api.token("viewer")).hosts()] != []


@sqlite_only
def test_an_enrolment_token_takes_over_nobody(closed_api: Api) -> None:
    """A host that is there is enrolled again by its own token, or by one that an admin made for it."""
    host = closed_api.host()
    with pytest.raises(Forbidden):
        closed_api.client(closed_api.token("enrol")).enrol(Enrolment(id=host.id, name="thief"))
    again = closed_api.client(host.token).enrol(Enrolment(id=host.id, name="h"))
    assert (again.epoch, again.token) == (2, None)
    fresh = closed_api.client(closed_api.token("enrol", host.id)).enrol(Enrolment(id=host.id, name="h"))
    assert fresh.epoch == 3
    with pytest.raises(Unauthorized):  # The lost token ends with the new one.
        closed_api.client(host.token).desired(host.id)
    assert closed_api.client(fresh.token).desired(host.id).models == []


def test_the_older_process_of_a_host_is_fenced(closed_api: Api) -> None:
    """After a restart the old process's reports are refused, by name, so that it ends; unknown epochs enrol again."""
    host = closed_api.host()
    client = closed_api.client(host.token)
    client.observed(host.id, Observed(epoch=1, models=[]))
    assert client.enrol(Enrolment(id=host.id, name="h")).epoch == 2
    with pytest.raises(StaleEpoch, match="epoch 2"):
        client.observed(host.id, Observed(epoch=1, models=[]))
    with pytest.raises(Conflict, match="enrol again"):
        client.observed(host.id, Observed(epoch=7, models=[]))


def test_a_retired_host_is_out(closed_api: Api) -> None:
    """Its token ends at once, its assignments are gone, and its id does not come back."""
    host = closed_api.host()
    assign(closed_api, host.id, put_ready(closed_api))
    admin = closed_api.client(closed_api.token("admin"))
    assert admin.retire(host.id, "sold").assignments == []
    assert admin.host(host.id).state == "retired"
    with pytest.raises(Unauthorized):
        closed_api.client(host.token).desired(host.id)
    with pytest.raises(Conflict, match="retired"):
        closed_api.client(closed_api.token("admin")).enrol(Enrolment(id=host.id, name="h"))
    assert admin.events(kinds=["host.retired"])[0].reason == "sold"

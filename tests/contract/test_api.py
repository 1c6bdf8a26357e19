"""The API's answers: pages, revisions, long polls, ranges, problems."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from fixtures.api import Api, Start, assign, digest_of, put_ready, sqlite_only, waits_noticed
from fixtures.registry import record

from weighbridge.registry import checkpoints, events
from weighbridge.registry.errors import Unavailable
from weighbridge.registry.models import Version
from weighbridge.registry.recipe import Policy
from weighbridge.registry.schemas import Enrolment


def record_many(api: Api, count: int) -> list[Version]:
    with api.db.transaction() as tx:
        return [record(tx, f"v{n}").version for n in range(count)]


def test_versions_come_in_pages(api: Api) -> None:
    """Newest first, each once, though others come meanwhile; filters by model, status and path."""
    record_many(api, 5)
    http = api.http()
    first = http.get("/v1/versions", params={"limit": 2}).json()
    with api.db.transaction() as tx:
        record(tx, "later")
    second = http.get("/v1/versions", params={"limit": 2, "after": first["next"]}).json()
    third = http.get("/v1/versions", params={"limit": 2, "after": second["next"]}).json()
    numbers = [row["number"] for page in (first, second, third) for row in page["items"]]
    assert (numbers, third["next"]) == ([5, 4, 3, 2, 1], None)

    def count(**params: str) -> int:
        return len(http.get("/v1/versions", params=params).json()["items"])

    assert count(model="digits") == count(status="discovered") == 6
    assert count(path="v3.safetensors") == 1
    assert count(status="ready") == 0
    assert count(model="other") == 0, "a filter selects"


def test_a_version_is_told_whole(api: Api) -> None:
    """By number, alias or `latest`: files, jobs, variants, what judged it; 404 names what is missing."""
    ready = put_ready(api)
    http = api.http()
    found = http.get("/v1/models/digits/versions/1").json()
    assert (found["status"], found["path"]) == ("ready", "a.safetensors")
    assert [job["stage"] for job in found["jobs"]] == ["validate", "evaluate"]
    assert found["variants"][0]["artifact_digest"]
    assert found["files"][0]["key"] == "digits/a.safetensors"
    assert found["recipe"]["lane"] == "standard"
    assert http.put("/v1/models/digits/aliases/mine", json={"version": ready.number}).status_code == 200
    by_alias = http.get("/v1/models/digits/versions/mine").json()
    assert (by_alias["number"], by_alias["aliases"]) == (1, ["mine"])
    assert http.get("/v1/models/digits/versions/latest").json()["number"] == 1
    missing = http.get("/v1/models/digits/versions/7")
    assert (missing.status_code, missing.json()["code"]) == (404, "not-found")
    assert http.get("/v1/models/nobody").json()["detail"] == "no model nobody"


def test_aliases_move_at_the_revision_that_was_read(api: Api) -> None:
    """If-Match lets one of two win; 0 demands that it is new; rollouts' own aliases are not set by hand."""
    record_many(api, 2)
    http = api.http()
    path = "/v1/models/digits/aliases/mine"

    def put(version: int, revision: int | None = None, path: str = path) -> tuple[int, dict[str, Any]]:
        headers = {} if revision is None else {"if-match": f'"{revision}"'}
        answer = http.put(path, json={"version": version}, headers=headers)
        return answer.status_code, answer.json()

    assert put(1, 0)[0] == 200
    assert put(1, 0)[1]["code"] == "revision-mismatch"
    assert put(2, 1) == (200, {"name": "mine", "number": 2, "revision": 2})
    status, problem = put(1, 1)
    assert (status, problem["data"]) == (412, {"expected": 1, "found": 2})
    assert put(9)[0] == 404
    assert put(1, path="/v1/models/digits/aliases/champion")[0] == 409
    assert put(1, path="/v1/models/digits/aliases/7")[0] == 422
    assert http.get("/v1/models/digits").json()["aliases"] == {"mine": 2}
    assert http.delete(path, headers={"if-match": '"1"'}).status_code == 412
    assert http.delete(path, headers={"if-match": "x"}).status_code == 422
    assert http.delete(path).status_code == 204
    assert http.delete(path).status_code == 404


def test_tags(api: Api) -> None:
    """On models and on versions."""
    record_many(api, 1)
    http = api.http()
    assert http.put("/v1/models/digits/tags/team", json={"value": "vision"}).status_code == 204
    assert http.put("/v1/models/digits/versions/1/tags/run", json={"value": "7"}).status_code == 204
    assert http.get("/v1/models/digits").json()["tags"] == {"team": "vision"}
    assert http.get("/v1/models/digits/versions/1").json()["tags"] == {"run": "7"}
    assert http.delete("/v1/models/digits/versions/1/tags/run").status_code == 204
    assert http.delete("/v1/models/digits/versions/1/tags/run").status_code == 404


def test_verbs_on_versions(api: Api) -> None:
    """What has ended is judged anew or put away, under the caller's name; what has not is a conflict."""
    with api.db.transaction() as tx:
        record(tx, "bad", refused="a pickle named .safetensors")
    http = api.http()
    with api.notifier.listen("jobs") as bell:
        again = http.post("/v1/models/digits/versions/1/rejudge", json={"reason": "fixed", "actor": "ann"})
        assert bell.wait(0)
    assert again.json()["status"] == "discovered"
    assert http.post("/v1/models/digits/versions/1/archive", json={}).status_code == 409
    assert http.post("/v1/models/digits/versions/1/rejudge", json={}).status_code == 409
    put_ready(api, "good")
    assert http.post("/v1/models/digits/versions/2/archive", json={}).json()["status"] == "archived"
    assert http.post("/v1/models/digits/versions/2/rejudge", json={}).status_code == 409
    feed = http.get("/v1/events", params={"after": 0, "limit": 1000}).json()["items"]
    assert ("local", "fixed") in [(event["actor"], event["reason"]) for event in feed]


def test_what_waits_is_told(api: Api) -> None:
    """Status and checkpoints say what waits and why."""
    put_ready(api)
    with api.db.transaction() as tx:
        checkpoints.waiting(tx, "digits", "b", reason="2 of 4 shards are there", seen="s1")
    http = api.http()
    status = http.get("/v1/status").json()
    assert (status["models"], status["versions"], status["jobs"]) == (1, {"ready": 1}, {"done": 2})
    assert [row["reason"] for row in status["waiting"]] == ["2 of 4 shards are there"]
    assert [row["path"] for row in http.get("/v1/checkpoints").json()["items"]] == ["b"]
    assert [row["path"] for row in http.get("/v1/checkpoints?state=complete").json()["items"]] == ["a.safetensors"]


def test_a_rollout_by_hand(api: Api) -> None:
    """Started, paused, resumed, aborted, with everything told; the second one at once is a conflict."""
    put_ready(api)
    http = api.http()
    started = http.post("/v1/rollouts", json={"model": "digits", "settings": {"bake": 5}, "reason": "try"})
    assert started.status_code == 201, started.text
    rollout = started.json()
    assert (rollout["number"], rollout["status"], rollout["settings"]["bake"]) == (1, "running", 5.0)
    assert http.post("/v1/rollouts", json={"model": "digits"}).status_code == 409
    assert http.post("/v1/rollouts", json={"model": "digits", "settings": {"x": 1}}).status_code == 422
    path = f"/v1/rollouts/{rollout['id']}"
    paused = http.post(f"{path}/pause", json={"reason": "lunch", "actor": "ann"}).json()
    assert (paused["status"], paused["reason"]) == ("paused", "paused by local: lunch")
    assert http.post(f"{path}/pause", json={}).status_code == 409
    assert http.post(f"{path}/resume", json={}).json()["status"] == "running"
    assert http.post(f"{path}/abort", json={}).status_code == 200
    assert http.post(f"{path}/explode", json={}).status_code == 422
    assert [step["action"] for step in http.get(path).json()["steps"]] == ["pause", "resume", "abort"]
    assert len(http.get("/v1/rollouts?model=digits&going=true").json()["items"]) == 1
    assert http.get("/v1/rollouts/9").status_code == 404


# --- long polls


@contextmanager
def polling(api: Api, path: str) -> Iterator[Any]:
    """A call that is under way, and surely waits, while the block runs."""
    with waits_noticed() as waiting, ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: api.http().get(path).json())
        assert waiting.wait(10)
        yield future


def test_events_wait_for_something_new(api: Api) -> None:
    """A long poll answers when something happens (polls are slow here: a bell does it), and says where to go on."""
    http = api.http()
    assert http.get("/v1/events").json() == {"items": [], "next": "0"}
    with polling(api, "/v1/events?after=0&wait=4") as future:
        record_many(api, 1)
        api.notifier.ring("events")
        page = future.result(3)
    kinds = [event["kind"] for event in page["items"]]
    assert kinds[0] == "model.created"
    last = int(page["next"])
    assert http.get(f"/v1/events?after={last}").json() == {"items": [], "next": str(last)}
    assert http.get("/v1/events").json()["next"] == str(last)
    assert http.get(f"/v1/events?after={last}&wait=0.05").json()["items"] == []


def test_a_filtered_feed_moves_on(api: Api) -> None:
    """Events that do not match are passed over, and not looked at again."""
    record_many(api, 1)
    http = api.http()
    page = http.get("/v1/events", params={"after": 0, "model": "digits", "kind": ["version.recorded"]}).json()
    assert [event["kind"] for event in page["items"]] == ["version.recorded"]
    none = http.get("/v1/events", params={"after": 0, "model": "other"}).json()
    assert (none["items"], none["next"]) == ([], page["next"])
    paged = http.get("/v1/events", params={"after": 0, "limit": 1}).json()
    assert paged["next"] == str(paged["items"][-1]["seq"]) == "1"


def test_a_host_hears_of_its_assignment(api: Api) -> None:
    """The desired state comes when it changes, whole; until then, and after a while, the old one."""
    version, host = put_ready(api), api.host()
    assert api.http().get(f"/v1/hosts/{host.id}/desired?after=0&wait=0.05").json() == {"revision": 0, "models": []}
    with polling(api, f"/v1/hosts/{host.id}/desired?after=0&wait=4") as future:
        slot = assign(api, host.id, version)
        desired = future.result(3)
    assert desired["revision"] == 1
    assert desired["models"] == [{"model": "digits", "generation": 1, "slots": [slot.model_dump()]}]
    assert api.http().get(f"/v1/hosts/{host.id}/desired").json() == desired
    seen = api.http().get(f"/v1/hosts/{host.id}").json()
    assert (seen["assignments"][0]["model"], seen["assignments"][0]["observed"]) == ("digits", None)


@sqlite_only
def test_many_who_wait_cost_one_look(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring makes one look at the database, however many hosts wait; only whom it concerns reads more."""
    looks, pulse, all_wait = [], api.app.state.context.pulse, threading.Event()
    look = type(pulse)._look

    def counted(self: Any) -> Any:
        looks.append(1)
        if len(pulse._waiting) == 20:
            all_wait.set()
        return look(self)

    monkeypatch.setattr(type(pulse), "_look", counted)
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(lambda: api.http().get("/v1/events?after=0&wait=20").json()) for _ in range(20)]
        while not all_wait.wait(0.05):
            api.notifier.ring("hosts")
        before = len(looks)
        record_many(api, 1)
        api.notifier.ring("events")
        assert all(future.result(10)["items"] for future in futures)
    assert len(looks) - before <= 4


def test_a_lost_ring_costs_a_poll(start_api: Start) -> None:
    """Nobody rings: the feed still goes on, at the next look."""
    api = start_api(poll_seconds=0.05)
    with polling(api, "/v1/events?after=0&wait=10") as future:
        record_many(api, 1)
        assert future.result(5)["items"]


# --- blobs and templates


@sqlite_only
def test_blobs_are_read_in_ranges(api: Api) -> None:
    """Whole, from an offset, a part; 416 behind the end; what is no range is no error."""
    content = bytes(range(256)) * 10_000
    digest = api.blobs.put_bytes(content).digest
    http = api.http()

    def get(value: str | None = None) -> Any:
        return http.get(f"/v1/blobs/{digest}", headers={} if value is None else {"range": value})

    whole = get()
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, content, f'"{digest}"')
    rest = get("bytes=1000000-")
    assert (rest.status_code, rest.content) == (206, content[1_000_000:])
    assert rest.headers["content-range"] == f"bytes 1000000-{len(content) - 1}/{len(content)}"
    assert get("bytes=5-9").content == content[5:10]
    assert get("bytes=5-99999999").content == content[5:]
    assert get(f"bytes={len(content)}-").status_code == 416
    assert get("bytes=9-5").status_code == 416
    assert get("lines=1-2").status_code == 200
    assert http.get(f"/v1/blobs/{'0' * 64}").json()["code"] == "not-found"


@sqlite_only
def test_blobs_may_be_answered_by_the_store(start_api: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the settings say so and the store can, hosts and clients are sent to it."""
    api = start_api(presign_seconds=60)
    digest = api.blobs.put_bytes(b"x").digest
    assert api.http().get(f"/v1/blobs/{digest}").status_code == 200
    monkeypatch.setattr(
        type(api.blobs.store), "presign", lambda self, key, expires: f"https://s3/{key}?e={expires}", raising=False
    )
    answer = api.http().get(f"/v1/blobs/{digest}")
    assert answer.status_code == 307
    assert answer.headers["location"] == f"https://s3/artifacts/blobs/{digest[:2]}/{digest}?e=60"


@pytest.mark.parametrize("size", [(1 << 20) + 1, 2 << 20, (5 << 19) + 1])
@sqlite_only
def test_a_damaged_blob_is_never_handed_out_whole(api: Api, size: int) -> None:
    """Of other bytes under its name the end is held back, whatever their number; a range is its reader's to check."""
    digest = api.blobs.put_bytes(b"a" * size).digest
    http = api.http()
    assert http.get(f"/v1/blobs/{digest}").content == b"a" * size
    api.blobs.store.put(api.blobs.key(digest), b"b" * size)
    answer = http.get(f"/v1/blobs/{digest}")
    assert len(answer.content) < size
    assert answer.headers["content-length"] == str(size), "whoever reads it sees that it was broken off"
    assert len(http.get(f"/v1/blobs/{digest}", headers={"range": "bytes=0-"}).content) < size


@pytest.mark.parametrize("size", [1, 1 << 20])
@sqlite_only
def test_a_small_damaged_blob_is_an_answer_that_says_so(api: Api, size: int) -> None:
    """Nothing of it is handed out, and nobody is told that the registry does not answer."""
    digest = api.blobs.put_bytes(b"a" * size).digest
    assert api.client().blob(digest) == b"a" * size
    api.blobs.store.put(api.blobs.key(digest), b"b" * size)
    answer = api.http().get(f"/v1/blobs/{digest}")
    assert (answer.status_code, f"not {digest}" in answer.json()["detail"]) == (422, True)


def test_a_template_is_uploaded_and_registered(api: Api) -> None:
    """Its bytes are kept by digest and never loaded; a name never gets other content; what waits is judged again."""
    content = b"not even a pt2: nothing looks inside"
    digest = digest_of(content)
    http = api.http()
    new = {"name": "mlp", "digest": digest, "fingerprint": "f", "parameters": {}, "inputs": [], "outputs": []}
    missing = http.post("/v1/templates", json=new)
    assert (missing.status_code, "upload" in missing.json()["detail"]) == (422, True)
    assert http.put(f"/v1/blobs/{digest}", content=content).status_code == 204
    assert http.put(f"/v1/blobs/{digest}", content=content).status_code == 204
    assert http.post("/v1/templates", json=new).status_code == 201
    assert http.post("/v1/templates", json=new).status_code == 201
    other = api.blobs.put_bytes(b"other").digest
    assert http.post("/v1/templates", json=new | {"digest": other}).status_code == 409
    assert [row["name"] for row in http.get("/v1/templates").json()["items"]] == ["mlp"]
    assert http.get("/v1/templates/mlp").json()["digest"] == digest


@sqlite_only
def test_uploads_are_checked(start_api: Start) -> None:
    """Other bytes than the digest says, or too many, leave nothing behind."""
    api = start_api(max_upload_bytes=10)
    http, digest = api.http(), digest_of(b"right")
    assert http.put(f"/v1/blobs/{digest}", content=b"wrong").status_code == 422
    assert http.put(f"/v1/blobs/{digest}", content=b"x" * 11).status_code == 413
    assert http.put(f"/v1/blobs/{digest}", content=iter([b"x" * 6] * 2)).status_code == 413
    assert http.put(f"/v1/blobs/{digest}", content=b"x", headers={"content-length": "-1"}).status_code < 500
    assert list(api.blobs.store.list("")) == []


@sqlite_only
def test_bodies_have_a_limit(api: Api) -> None:
    """JSON that does not fit into memory's share is refused while it comes, with or without its length."""
    http = api.http()
    big = b'{"model": "' + b"x" * (17 << 20) + b'"}'
    for content in (big, iter([big[: 9 << 20], big[9 << 20 :]])):
        answer = http.post("/v1/rollouts", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (413, "too-large")


# --- errors


@sqlite_only
def test_every_error_is_a_problem(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """404, 405, 422, 500 and 503 are problem details; a 500 tells nothing of what happened."""
    http = api.http()

    def problem(method: str, path: str, **more: Any) -> tuple[int, str, str]:
        answer = http.request(method, path, **more)
        assert answer.headers["content-type"] == "application/problem+json"
        body = answer.json()
        assert body["status"] == answer.status_code
        return answer.status_code, body["code"], body["detail"]

    assert problem("GET", "/nothing")[:2] == (404, "not-found")
    assert problem("PATCH", "/v1/models")[:2] == (405, "method-not-allowed")
    status, code, detail = problem("POST", "/v1/rollouts", json={"model": "a", "version": []})
    assert (status, code) == (422, "invalid")
    assert "version" in detail
    malformed = problem("POST", "/v1/rollouts", content=b"{", headers={"content-type": "application/json"})
    assert malformed[:2] == (400, "malformed")

    def fail(error: Exception) -> None:
        monkeypatch.setattr(api.db, "read", lambda: (_ for _ in ()).throw(error))

    fail(RuntimeError("secret"))
    status, code, detail = problem("GET", "/v1/models")
    assert (status, code) == (500, "internal")
    assert "secret" not in detail
    fail(Unavailable("database x: away; check that it runs"))
    assert problem("GET", "/v1/models") == (503, "unavailable", "database x: away; check that it runs")
    assert http.get("/v1/models").headers["retry-after"] == "1"


@sqlite_only
def test_health(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready while database and store answer; alive anyway."""
    http = api.http()
    assert http.get("/readyz").json() == {"status": "ok"}

    def away() -> None:
        raise Unavailable("away")

    monkeypatch.setattr(api.db, "check", away)
    assert http.get("/readyz").status_code == 503
    assert http.get("/healthz").status_code == 200


@sqlite_only
def test_policies_and_the_description(start_api: Start) -> None:
    """The operator's policies are there to read, and the API describes itself."""
    api = start_api(policies=(Policy(model="digits", min_bake=9.0),))
    assert api.http().get("/v1/policies").json()[0]["min_bake"] == 9.0
    assert "/v1/hosts/{host_id}/desired" in api.http().get("/v1/openapi.json").json()["paths"]


def test_an_enrolled_host_needs_no_daemon_to_be_seen(api: Api) -> None:
    """Its labels, its device and when it last called; events tell of it."""
    enrolled = api.client().enrol(Enrolment(name="gpu-7", labels={"zone": "a"}, device={"kind": "cpu"}))
    assert enrolled.token is not None
    seen = api.http().get("/v1/hosts").json()["items"][0]
    assert (seen["id"], seen["labels"], seen["epoch"]) == (enrolled.id, {"zone": "a"}, 1)
    assert 0 <= seen["silent_seconds"] < 60
    with api.db.read() as tx:
        assert events.last(tx) == 0
    assert api.client().events(kinds=["host.enrolled"])[0].subject == f"host:{enrolled.id}"

"""The client: what it raises, waits for, resumes and verifies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
import pytest
from blake3 import blake3
from fixtures.api import Api, Start, put_ready, sqlite_only, waits_noticed
from fixtures.registry import record, work

from weighbridge.registry import checkpoints, jobs
from weighbridge.registry.client import Client
from weighbridge.registry.errors import (
    Conflict,
    Invalid,
    NotFound,
    NothingToCome,
    RegistryError,
    RevisionMismatch,
    Unauthorized,
    Unavailable,
)
from weighbridge.storage.errors import DigestMismatch


class Broken(httpx.BaseTransport):
    """Passes calls on, but breaks those that `breaks` names: before the answer, or after so many bytes of it."""

    def __init__(self, inner: httpx.BaseTransport, breaks: Callable[[httpx.Request, int], int | None]) -> None:
        self.inner, self.breaks, self.calls = inner, breaks, list[httpx.Request]()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request)
        after = self.breaks(request, len(self.calls))
        if after == 0:
            raise httpx.ConnectError("refused", request=request)
        answer = self.inner.handle_request(request)
        if after is None:
            return answer
        return httpx.Response(answer.status_code, headers=answer.headers, stream=Cut(answer.content[:after]))


class Cut(httpx.SyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self._content
        raise httpx.ReadError("the connection broke")


def broken(api: Api, breaks: Callable[[httpx.Request, int], int | None]) -> tuple[Client, Broken]:
    transport = Broken(api.transport(), breaks)
    api.opened.append(Client("http://127.0.0.1", transport=transport))
    return api.opened[-1], transport


def test_it_is_light() -> None:
    """Importing the client loads nothing that only servers, workers or hosts need."""
    code = "import sys, weighbridge; weighbridge.Client; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"torch", "celery", "sqlmodel", "sqlalchemy", "fastapi", "starlette", "uvicorn", "boto3", "numpy", "redis"}
    assert not heavy & loaded
    assert "weighbridge.registry.client" in loaded


def test_the_environment_names_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEIGHBRIDGE_URL and WEIGHBRIDGE_TOKEN are the defaults, read when a client is made."""
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((str(request.url), request.headers.get("authorization")))
        return httpx.Response(200, json={"items": []})

    monkeypatch.setenv("WEIGHBRIDGE_URL", "http://registry:1/")
    monkeypatch.setenv("WEIGHBRIDGE_TOKEN", "t")
    with Client(transport=httpx.MockTransport(answer)) as client:
        assert list(client.models()) == []
    monkeypatch.delenv("WEIGHBRIDGE_URL")
    monkeypatch.delenv("WEIGHBRIDGE_TOKEN")
    with Client(transport=httpx.MockTransport(answer)) as client:
        assert list(client.models()) == []
    assert sent == [("http://registry:1/v1/models", "Bearer t"), ("http://127.0.0.1:8400/v1/models", None)]


@sqlite_only
def test_errors_are_the_registrys(api: Api) -> None:
    """The same classes, words and data as where they were raised."""
    put_ready(api)
    client = api.client()
    with pytest.raises(NotFound, match=r"^no model nobody$") as found:
        client.model("nobody")
    assert (found.value.what, found.value.name) == ("model", "nobody")
    assert isinstance(found.value, LookupError)
    client.set_alias("digits", "mine", 1)
    with pytest.raises(RevisionMismatch) as mismatch:
        client.set_alias("digits", "mine", 1, revision=7)
    assert (mismatch.value.expected, mismatch.value.found) == (7, 1)
    with pytest.raises(Conflict):
        client.set_alias("digits", "champion", 1)
    with pytest.raises(Invalid):
        client.set_alias("digits", "7", 1)
    with pytest.raises(Unauthorized):
        api.client("wb_wrong").status()


def test_foreign_answers_are_said_to_be_foreign() -> None:
    """A proxy's 502 is Unavailable; another server on the port is named by its URL."""

    def client(status: int) -> Client:
        return Client("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(status, text="<html>")))

    with client(502) as proxy, pytest.raises(Unavailable, match="502"):
        proxy.start_rollout("digits")
    with client(418) as other, pytest.raises(RegistryError, match="check the URL"):
        other.status()


def test_the_token_stays_with_the_registry() -> None:
    """A redirect to the store's presigned link carries the range, not the token."""
    seen: list[tuple[str, str | None, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.host, request.headers.get("authorization"), request.headers.get("range")))
        if request.url.host == "registry":
            return httpx.Response(307, headers={"location": "https://store/blob?signed"})
        return httpx.Response(206, content=b"rest")

    with Client("http://registry", "secret", transport=httpx.MockTransport(answer)) as client:
        assert list(client.stream_blob("0" * 64, 5)) == [b"rest"]
    assert seen == [("registry", "Bearer secret", "bytes=5-"), ("store", None, "bytes=5-")]


@sqlite_only
def test_only_harmless_calls_are_tried_again(api: Api) -> None:
    """A read survives a connection that is refused; a start of a rollout is not sent twice."""
    client, transport = broken(api, lambda _, number: 0 if number in (1, 3) else None)
    assert client.status().models == 0
    assert len(transport.calls) == 2
    with pytest.raises(Unavailable, match="weighbridge up"):
        client.start_rollout("digits")
    assert len(transport.calls) == 3


@sqlite_only
def test_listings_are_lazy(start_api: Start) -> None:
    """A page is asked for when the one before is used up."""
    api = start_api(page_size=4)
    with api.db.transaction() as tx:
        for number in range(10):
            record(tx, f"v{number}")
    client, transport = broken(api, lambda *_: None)
    versions = client.versions("digits")
    assert [version.number for version in islice(versions, 4)] == [10, 9, 8, 7]
    assert len(transport.calls) == 1
    assert [version.number for version in versions] == [6, 5, 4, 3, 2, 1]
    assert len(transport.calls) == 3


@sqlite_only
def test_names_are_quoted(api: Api) -> None:
    """A model's name may hold what URLs give a meaning."""
    put_ready(api, model="a b%2f?#ü")
    client = api.client()
    assert client.model("a b%2f?#ü").latest == 1
    assert client.version("a b%2f?#ü", 1).status == "ready"
    client.set_tag("a b%2f?#ü", "k/v"[:1], "v", version=1)
    assert client.version("a b%2f?#ü").tags == {"k": "v"}


def test_waiting_ends_with_the_version(api: Api) -> None:
    """A path that is nothing yet, then a version, then judged: one call, woken by events."""
    client = api.client()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.wait, "digits", path="a.safetensors", timeout=20)
        with api.db.transaction() as tx:
            recorded = record(tx, "a")
        api.notifier.ring("events")
        with api.db.transaction() as tx:
            for job in work(tx, recorded.jobs[0].id):
                work(tx, job)
        api.notifier.ring("events")
        assert future.result(10).status == "ready"
    assert client.wait("digits", version=1).number == 1


@sqlite_only
def test_waiting_in_vain_says_for_what(api: Api) -> None:
    """Not seen at all, seen but not complete, recorded but not judged, not there."""
    client = api.client()
    with pytest.raises(TimeoutError, match="no checkpoint b of digits was seen"):
        client.wait("digits", path="b", timeout=0.01)
    with api.db.transaction() as tx:
        checkpoints.waiting(tx, "digits", "b", reason="2 of 4 shards are there", seen="s")
    with pytest.raises(TimeoutError, match="2 of 4 shards"):
        client.wait("digits", path="b", timeout=0.01)
    with api.db.transaction() as tx:
        record(tx, "a")
    with pytest.raises(TimeoutError, match=r"still discovered \(validate queued\)"):
        client.wait("digits", version=1, timeout=0.01)
    with pytest.raises(NotFound):
        client.wait("digits", version=2, timeout=0.01)
    with pytest.raises(ValueError, match="either"):
        client.wait("digits")


@sqlite_only
def test_watching_goes_on_where_it_was(api: Api) -> None:
    """Every event once, in order, though connections break and answers are lost on the way."""

    def often(request: httpx.Request, number: int) -> int | None:
        return 0 if number % 3 == 2 else 10 if number % 3 == 0 else None

    client, _ = broken(api, often)
    with api.db.transaction() as tx:
        for number in range(20):
            record(tx, f"v{number}")
    seen = [event.seq for event in islice(client.watch(0), 15)]
    seen += [event.seq for event in islice(client.watch(seen[-1], kinds=["version.recorded"]), 5)]
    assert seen[:15] == list(range(1, 16))
    assert seen == sorted(set(seen))


def test_watching_begins_now(api: Api) -> None:
    """Without a number only what comes after the first look."""
    put_ready(api, "before")
    client = api.client()
    with waits_noticed() as waiting, ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, client.watch(kinds=["version.recorded"]))
        assert waiting.wait(10)
        with api.db.transaction() as tx:
            record(tx, "after")
        api.notifier.ring("events")
        assert future.result(10).version == 2


# --- downloads


CONTENT = bytes(range(256)) * 20_000
"""About 5 MB."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to download into."""
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


@sqlite_only
def test_a_download_is_whole_and_verified(api: Api, folder: Path) -> None:
    """Every file under its path, with progress; a second call fetches nothing."""
    put_ready(api, content=CONTENT)
    told: list[tuple[str, int, int]] = []
    client, transport = broken(api, lambda *_: None)
    to = client.download("digits", 1, folder / "to", progress=lambda *seen: told.append(seen))
    assert [path.name for path in to.iterdir()] == ["a.safetensors"]
    assert (to / "a.safetensors").read_bytes() == CONTENT
    assert told[-1] == ("a.safetensors", len(CONTENT), len(CONTENT))
    before = len(transport.calls)
    client.download("digits", "latest", folder / "to")
    assert len(transport.calls) == before + 2  # The version and its manifest.
    with api.db.transaction() as tx:
        record(tx, "b")
    with pytest.raises(Conflict, match="no artifact"):
        client.download("digits", 2, folder)
    with pytest.raises(NotFound, match="no variant int8 of version 1 of digits"):
        client.download("digits", 1, folder, "int8")


@sqlite_only
def test_a_broken_download_goes_on(api: Api, folder: Path) -> None:
    """What came stays, the rest is asked for by its range; nothing half-read is ever under the file's name."""
    put_ready(api, content=CONTENT)
    cuts = iter([1_000_000, 2_000_000])
    started: list[str] = []

    def breaks(request: httpx.Request, number: int) -> int | None:
        if number <= 2:
            return None
        assert not (folder / "a.safetensors").exists()
        started.append(request.headers.get("range", ""))
        return next(cuts, None)

    client, _ = broken(api, breaks)
    client.download("digits", 1, folder)
    assert started == ["", "bytes=1000000-", "bytes=3000000-"]
    assert (folder / "a.safetensors").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]


@sqlite_only
def test_an_interrupted_download_is_resumed_by_the_next_call(api: Api, folder: Path) -> None:
    """Also by another process: what lies there counts if its bytes are right."""
    put_ready(api, content=CONTENT)
    digest = blake3(CONTENT).hexdigest()
    (folder / f".{digest}.part").write_bytes(CONTENT[:4_000_000])
    client, transport = broken(api, lambda *_: None)
    client.download("digits", 1, folder)
    assert transport.calls[-1].headers["range"] == "bytes=4000000-"
    assert (folder / "a.safetensors").read_bytes() == CONTENT


@sqlite_only
@pytest.mark.parametrize("there", [b"x" * 100, CONTENT, CONTENT + b"too long"], ids=["wrong", "whole", "long"])
def test_a_part_is_never_trusted(api: Api, folder: Path, there: bytes) -> None:
    """Wrong bytes of an earlier call do not survive; a whole part needs no transfer."""
    put_ready(api, content=CONTENT)
    (folder / f".{blake3(CONTENT).hexdigest()}.part").write_bytes(there)
    client, transport = broken(api, lambda *_: None)
    client.download("digits", 1, folder)
    assert (folder / "a.safetensors").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
    assert (len(transport.calls) == 2) == (there == CONTENT)


@sqlite_only
def test_tampered_bytes_are_refused(api: Api, folder: Path) -> None:
    """Bytes that changed in the store are no file, and no manifest."""
    put_ready(api, content=CONTENT)
    digest = blake3(CONTENT).hexdigest()
    api.blobs.store.put(api.blobs.key(digest), CONTENT[:-1] + b"!")
    with pytest.raises(DigestMismatch):
        api.client().download("digits", 1, folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(DigestMismatch):
        api.client().blob(digest)


@sqlite_only
@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil"])
def test_no_file_leaves_the_folder(api: Api, folder: Path, name: str) -> None:
    """Whatever an artifact's manifest says."""
    put_ready(api, name.replace("\\", "\\\\"), content=CONTENT)
    with pytest.raises(Invalid, match="leads out"):
        api.client().download("digits", 1, folder / "to")
    assert list(folder.iterdir()) == []


@sqlite_only
def test_a_template_is_uploaded(api: Api, folder: Path) -> None:
    """The file by its digest, then its name; the same again is no error, others' content is."""
    path = folder / "mlp.pt2"
    path.write_bytes(CONTENT)
    client = api.client()

    def add() -> str:
        return client.add_template("mlp", path, fingerprint="f", parameters={}, inputs=[], outputs=[]).digest

    assert add() == add() == blake3(CONTENT).hexdigest()
    assert client.blob(client.template("mlp").digest) == CONTENT
    path.write_bytes(b"other")
    with pytest.raises(Conflict):
        add()
    digest = blake3(CONTENT).hexdigest()
    assert b"".join(client.stream_blob(digest, 5_000_000)) == CONTENT[5_000_000:]
    assert list(client.stream_blob(digest, len(CONTENT))) == []


@sqlite_only
def test_waiting_ends_at_once_where_only_a_person_can_help(api: Api) -> None:
    """A refused checkpoint, and one whose recipe is invalid: the reason is in the error, and no time passes."""
    client = api.client()
    with api.db.transaction() as tx:
        checkpoints.refused(tx, "digits", "digits/m.pt", reason="publish safetensors", seen="s")
        checkpoints.waiting(tx, "digits", "digits/x/", reason="line 3: no gate", seen="s", needs_person=True)
        checkpoints.waiting(tx, "digits", "digits/y/", reason="2 of 4 shards", seen="s")
    with pytest.raises(NothingToCome, match=r"digits/m\.pt of digits is refused: publish safetensors") as refused:
        client.wait("digits", path="digits/m.pt")
    assert (refused.value.state, refused.value.reason) == ("refused", "publish safetensors")
    with pytest.raises(NothingToCome, match="only a person can change that: line 3"):
        client.wait("digits", path="digits/x/")
    with pytest.raises(TimeoutError, match="2 of 4 shards"):
        client.wait("digits", path="digits/y/", timeout=0.01)


@sqlite_only
def test_waiting_ends_where_a_job_was_set_aside(api: Api) -> None:
    """It ended two workers, and only a person begins it anew; while it is done again, it is waited for."""
    client = api.client()
    with api.db.transaction() as tx:
        recorded = record(tx, "a")
        claim = jobs.claim(tx, recorded.jobs[0].id, owner="w", lease_seconds=60)
        assert claim is not None
        jobs.set_aside(tx, claim, "it ended two workers")
    with pytest.raises(NothingToCome, match=r"set aside.*ended two workers"):
        client.wait("digits", version=1)
    client.rejudge("digits", 1)
    with pytest.raises(TimeoutError):
        client.wait("digits", version=1, timeout=0.01)


def test_waiting_ends_when_a_checkpoint_turns_out_to_need_a_person(api: Api) -> None:
    """Also later, and where neither its state nor its reason changes."""
    client = api.client()
    with api.db.transaction() as tx:
        checkpoints.waiting(tx, "digits", "digits/x/", reason="no index", seen="s")
    with ThreadPoolExecutor(1) as pool, waits_noticed() as noticed:
        waiting = pool.submit(client.wait, "digits", path="digits/x/", timeout=30)
        assert noticed.wait(20)
        with api.db.transaction() as tx:
            checkpoints.waiting(tx, "digits", "digits/x/", reason="no index", seen="s", needs_person=True)
        api.notifier.ring("events")
        with pytest.raises(NothingToCome, match="no index"):
            waiting.result(20)


@sqlite_only
def test_a_folders_path_without_its_slash_is_said_to_lack_it(api: Api) -> None:
    """At once where the folder was seen; otherwise with the reason for which it waited in vain."""
    client = api.client()
    with pytest.raises(TimeoutError, match=r"ends with a slash: 'digits/run-1/'"):
        client.wait("digits", path="digits/run-1", timeout=0.01)
    with pytest.raises(TimeoutError, match=r"not lie in the folder of digits"):
        client.wait("digits", path="run-1/", timeout=0.01)
    with api.db.transaction() as tx:
        checkpoints.waiting(tx, "digits", "digits/run-1/", reason="2 of 4 shards", seen="s")
    with pytest.raises(Invalid, match=r"the folder 'digits/run-1/' is: end it with a slash"):
        client.wait("digits", path="digits/run-1")
    with api.db.transaction() as tx:
        record(tx, "b", path="digits/run-2/")
    with pytest.raises(Invalid, match=r"'digits/run-2/'"):
        client.wait("digits", path="digits/run-2")


@sqlite_only
def test_what_the_registry_would_refuse_is_said_in_its_words(api: Api) -> None:
    """Before it is sent: an expected error that names the field, no traceback of a library."""
    client = api.client()
    for call, field in (
        (lambda: client.create_token("viewer", "n" * 256), "name"),
        (lambda: client.create_token("viewer", ttl=float("inf")), "ttl"),
        (lambda: client.set_tag("digits", "k", "v" * 5001), "value"),
        (lambda: client.set_alias("digits", "a", 2**31), "version"),
        (lambda: client.start_rollout("m" * 256), "model"),
    ):
        with pytest.raises(Invalid, match=field):
            call()

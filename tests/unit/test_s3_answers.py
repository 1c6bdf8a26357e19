"""What a store says of one object costs that object at most; and a store is asked for what is used of it alone."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.awsrequest import AWSResponse
from fixtures.odd_files import as_nobody

from weighbridge.storage.errors import AccessDenied, StorageError
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.options import S3Options
from weighbridge.storage.protocols import ObjectInfo, PassedOver
from weighbridge.storage.s3 import S3Store, new_client
from weighbridge.storage.settings import StorageSettings

GOOD = "2026-07-01T10:00:00.000Z"
OPTIONS = S3Options(endpoint_url="http://127.0.0.1:9", access_key="x", secret_key="x", region="us-east-1", attempts=1)


class Raw(io.BytesIO):
    """A body as botocore reads it."""

    def stream(self, **_: Any) -> list[bytes]:
        return [self.read()]


class Bucket:
    """Answers a client's requests in the wire's own words: `objects` are keys and dates."""

    def __init__(self, objects: dict[str, str], allowed: str = "") -> None:
        self.objects, self.allowed, self.prefixes = objects, allowed, list[str]()
        self.client = new_client(OPTIONS)
        self.client.meta.events.register("before-send.s3", self.answer)

    def answer(self, request: Any, **_: Any) -> AWSResponse:
        parts = urlsplit(request.url)
        if request.method == "HEAD":
            date = self.objects[parts.path.removeprefix("/b/")]
            headers = {"last-modified": date, "etag": '"e"', "content-length": "1"}
            return AWSResponse(request.url, 200, headers, Raw())
        prefix = parse_qs(parts.query).get("prefix", [""])[0]
        self.prefixes.append(prefix)
        if not prefix.startswith(self.allowed):
            return AWSResponse(request.url, 403, {}, Raw(b"<Error><Code>AccessDenied</Code></Error>"))
        items = (
            f"<Contents><Key>{key}</Key><Size>1</Size><ETag>e</ETag><LastModified>{date}</LastModified></Contents>"
            for key, date in self.objects.items()
            if key.startswith(prefix)
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
        return AWSResponse(request.url, 200, {}, Raw(text.encode()))


@pytest.mark.parametrize(
    "date",
    ["30489-09-11T02:40:00.000Z", "9999-12-31T23:59:59-05:00", "0001-01-01T00:00:00+05:00", "", "yesterday",
     "2026-02-30T00:00:00Z", "99999999999999999999"],
)  # fmt: skip
def test_a_date_that_is_none_costs_its_own_object(date: str) -> None:
    """The others are listed; its own reason names the key and the date, and says what to do."""
    store = S3Store("b", client=Bucket({"m/a": GOOD, "m/odd": date, "m/z": GOOD}).client)
    found = {one.key: one for one in store.survey("m/")}
    assert [key for key, one in found.items() if isinstance(one, ObjectInfo)] == ["m/a", "m/z"]
    odd = found["m/odd"]
    assert isinstance(odd, PassedOver)
    assert repr(date) in odd.reason
    assert "copy it onto itself" in odd.reason
    assert store.find("m/odd") == odd
    assert [one.key for one in store.list("m/")] == ["m/a", "m/z"]
    assert [one.key for one in store.entries("m/")] == ["m/a", "m/z"]
    with pytest.raises(StorageError, match=r"^m/odd: .*which is no date"):
        store.head("m/odd")


def test_an_answer_that_is_none_is_the_stores() -> None:
    """A page of something else than XML is translated as every other fault."""
    bucket = Bucket({})
    bucket.objects = {"<<": GOOD}
    with pytest.raises(StorageError, match="s3://b"):
        list(S3Store("b", client=bucket.client).survey(""))


@pytest.mark.parametrize(("prefix", "used"), [("", "runs/"), ("", "/runs"), ("", "runs"), ("team", "runs")])
def test_keys_that_are_limited_to_what_is_used_suffice(prefix: str, used: str) -> None:
    """A check asks for nothing that such keys do not allow; it still sees that another part is refused."""
    allowed = f"{prefix}/runs/".removeprefix("/")
    bucket = Bucket({f"{allowed}m/a": GOOD}, allowed)
    S3Store("b", prefix, client=bucket.client, used=used).check()
    assert bucket.prefixes == [allowed]
    for other in ("", "other"):
        with pytest.raises(AccessDenied):
            S3Store("b", prefix, client=bucket.client, used=other).check()


def test_settings_say_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watched prefix of the bucket, and that of the artifacts: daemon and registry check these."""
    bucket = Bucket({}, "runs/")
    monkeypatch.setattr("weighbridge.storage.s3.new_client", lambda _: bucket.client)
    settings = StorageSettings(url="s3://bkt", prefix="runs", artifacts_prefix="runs/.weighbridge")
    settings.open_source().check()
    settings.open_artifacts().check()
    settings.open_models().check()
    assert bucket.prefixes == ["runs/", "runs/.weighbridge/", "runs/"]


def test_a_folder_is_checked_where_it_is_used() -> None:
    """One may pass through the root without reading it; what is used may not be there yet, and must be readable."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders let nobody pass
        root = Path(name)
        (root / "runs").mkdir()
        root.chmod(0o311)
        for used in ("runs", "later"):
            as_nobody(FolderStore(root, used=used).check)
        (root / "runs").chmod(0o311)
        assert "Permission denied" in as_nobody(lambda: refused(FolderStore(root, used="runs")))


def refused(store: FolderStore) -> str:
    with pytest.raises(AccessDenied) as error:
        store.check()
    return str(error.value)

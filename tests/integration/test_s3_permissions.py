"""Keys that may not do everything, and stores that cannot: nothing stops that can do without, and the rest is named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fixtures.checkpoints import safetensors
from fixtures.refusing import DENIED, Asked, Refusal, Refusing, refuse
from fixtures.storage import LISTER

from weighbridge.storage import optional
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.completeness import Complete, Waiting, look
from weighbridge.storage.errors import (
    AccessDenied,
    NotSupported,
    ObjectNotFound,
    PreconditionFailed,
    StorageUnavailable,
)
from weighbridge.storage.pins import pin
from weighbridge.storage.publish import publish
from weighbridge.storage.s3 import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BIG = bytes(range(256)) * (6 << 12)  # 6 MiB: two parts


@contextmanager
def forgetting(store: S3Store, header: str) -> Iterator[None]:
    """As if the store took no notice of a header of GETs: it is never sent."""

    def forget(request: Any, **_: Any) -> None:
        del request.headers[header]

    event = "before-sign.s3.GetObject"
    store.client.meta.events.register(event, forget)
    yield
    store.client.meta.events.unregister(event, forget)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelname == "WARNING" and one.name == optional.log.name]


@pytest.mark.parametrize(
    "answer",
    [DENIED, (501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "NotImplemented"), (400, "InvalidArgument"),
     (404, "NoSuchKey")],
)  # fmt: skip
def test_uploads_that_cannot_be_listed_hold_nothing_back(
    answer: tuple[int, str], refusing: Refusing, refused_store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint is seen and complete; one warning names the right; when the right comes, uploads count again."""
    refused_store.put("digits/run/model.safetensors", safetensors())
    refusing.rule = refuse(answer, method="GET", query="uploads")
    for _ in range(3):
        assert isinstance(look(refused_store, "digits/run/"), Complete)
    [said] = warnings(caplog)
    assert "list unfinished multipart uploads" in said
    assert ("s3:ListBucketMultipartUploads" in said) == (answer is DENIED)
    refusing.rule = lambda asked: None
    with refused_store.unfinished("digits/run/tokenizer.json"):
        assert isinstance(look(refused_store, "digits/run/"), Waiting)
    assert isinstance(look(refused_store, "digits/run/"), Complete)
    assert len(warnings(caplog)) == 1


def test_a_bucket_in_another_region_is_no_missing_right(refusing: Refusing, refused_store: S3Store) -> None:
    """The message says which setting is wrong; nothing is done without."""
    refusing.rule = refuse((400, "AuthorizationHeaderMalformed"))
    for verb in (refused_store.check, lambda: refused_store.uploads("")):
        with pytest.raises(AccessDenied, match=r"another region.*set storage\.s3\.region") as denied:
            verb()
        assert denied.value.permission is None


def test_uploads_of_a_store_that_is_away_are_waited_for(refusing: Refusing, refused_store: S3Store) -> None:
    """A 503 may be another answer in a second: nothing is judged without it."""
    refusing.rule = refuse((503, "SlowDown"), query="uploads")
    with pytest.raises(StorageUnavailable):
        refused_store.uploads("")


def test_keys_that_may_not_name_versions_read_by_etag(
    refusing: Refusing, refused_store: S3Store, s3_client: S3Client, caplog: pytest.LogCaptureFixture
) -> None:
    """In a versioned bucket without s3:GetObjectVersion: a recipe is read, a copy made, and another content refused."""
    s3_client.put_bucket_versioning(Bucket=refused_store.bucket, VersioningConfiguration={"Status": "Enabled"})
    refusing.rule = refuse(DENIED, query="versionId")
    pinned = pin(refused_store.put("digits/recipe.yaml", b"gates: []"))
    assert pinned.version_id
    assert refused_store.get("digits/recipe.yaml", if_match=pinned) == b"gates: []"
    assert refused_store.copy(pinned, "digits/copy").size == 9
    refused_store.put("digits/recipe.yaml", b"other")
    with pytest.raises(PreconditionFailed):
        refused_store.get("digits/recipe.yaml", if_match=pinned)
    [said] = [one for one in warnings(caplog) if "version id" in one]
    assert "s3:GetObjectVersion" in said


@pytest.mark.parametrize("content", [b"small", BIG], ids=["small", "in parts"])
def test_a_store_without_conditional_writes_is_looked_at_first(
    content: bytes, refusing: Refusing, refused_store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A free key is written, a taken one kept, and nothing of a broken upload stays."""
    refusing.rule = refuse((501, "NotImplemented"), header="if-none-match")
    refused_store.put("a", content, if_none_match=True)
    with pytest.raises(PreconditionFailed):
        refused_store.put("a", content[::-1], if_none_match=True)
    assert refused_store.get("a") == content
    assert refused_store.uploads("") == []
    assert len(warnings(caplog)) == 1


def test_a_store_without_conditional_reads_still_reads_what_was_pinned(
    refusing: Refusing, refused_store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it refuses the condition or takes no notice of it, another content is PreconditionFailed."""
    pinned = pin(refused_store.put("a", b"first"))
    refusing.rule = refuse((501, "NotImplemented"), header="if-match")
    assert refused_store.get("a", start=1, end=3, if_match=pinned) == b"ir"
    refused_store.put("a", b"other")
    with pytest.raises(PreconditionFailed):
        refused_store.get("a", if_match=pinned)
    refusing.rule = lambda asked: None
    with forgetting(refused_store, "If-Match"), pytest.raises(PreconditionFailed):
        refused_store.get("a", if_match=pinned)
    assert len(warnings(caplog)) == 1


def test_a_store_that_answers_ranges_with_everything_is_not_believed(refused_store: S3Store) -> None:
    """A header's bytes must not be those of another place, nor a whole checkpoint be read for them."""
    refused_store.put("a", b"0123456789")
    with forgetting(refused_store, "Range"):
        for start, end in ((2, None), (2, 4), (0, 4)):
            with pytest.raises(NotSupported, match="whole object"):
                refused_store.get("a", start=start, end=end)
        assert refused_store.get("a", start=0, end=10) == b"0123456789"


def test_a_store_without_copies_is_copied_through_this_machine(
    refusing: Refusing, refused_store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream becomes a blob all the same."""
    refusing.rule = refuse((501, "NotImplemented"), header="x-amz-copy-source")
    for content in (b"weights", b"others"):
        blob = Blobs(refused_store, "artifacts").put_stream(io.BytesIO(content))
        assert Blobs(refused_store, "artifacts").get(blob.digest) == content
    assert len(warnings(caplog)) == 1


def test_keys_that_may_not_ask_for_the_bucket_learn_that_an_object_is_missing(
    refusing: Refusing, refused_store: S3Store
) -> None:
    """Keys of one prefix are refused HeadBucket: a recipe that is not there is no store that is away."""

    def rule(asked: Asked) -> Refusal:
        return DENIED if asked.path.count("/") == 1 and asked.query.get("prefix", "") == "" else None

    refusing.rule = rule
    with pytest.raises(ObjectNotFound):
        refused_store.head("digits/recipe.yaml")
    with pytest.raises(ObjectNotFound):
        refused_store.get("digits/recipe.yaml")


def test_an_upload_that_cannot_be_aborted_tells_what_went_wrong_first(
    refusing: Refusing, refused_store: S3Store
) -> None:
    """Without s3:AbortMultipartUpload parts stay, and the key that was taken is still what is told."""
    refused_store.put("a", b"first")
    refusing.rule = refuse(DENIED, method="DELETE")
    with pytest.raises(PreconditionFailed):
        refused_store.put("a", BIG, if_none_match=True)


def test_keys_that_may_not_delete_publish_and_store(
    refusing: Refusing, refused_store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The claim and the staged copy stay; the checkpoint is complete, the blob is there, and nothing is an error."""
    refusing.rule = refuse(DENIED, method="DELETE")
    publish({"w": [1.0]}, "digits", "run", store=refused_store)
    assert isinstance(look(refused_store, "digits/run/"), Complete)
    blobs = Blobs(refused_store, "artifacts")
    for content in (b"a", b"b"):
        blobs.put_stream(io.BytesIO(content))
    [said] = warnings(caplog)
    assert "s3:DeleteObject" in said


def test_nothing_newer_than_s3_itself_is_sent(refusing: Refusing, refused_store: S3Store) -> None:
    """Older stores refuse checksums, trailers and chunked signatures: none is sent, whatever is written."""

    def rule(asked: Asked) -> Refusal:
        newer = [name for name in asked.headers if "checksum" in name or name in ("x-amz-trailer", "expect-trailer")]
        return (501, "NotImplemented") if newer or "chunked" in str(asked.headers) else None

    refusing.rule = rule
    for content in (b"small", BIG):
        pinned = pin(refused_store.put("a", content, if_none_match=content == b"small"))
        refused_store.copy(pinned, "b")
        assert refused_store.get("b", start=1, if_match=pin(refused_store.head("b"))) == content[1:]
        refused_store.delete("b")
    assert not [call.what for call in refused_store.optional if call.missing]


def test_a_denied_call_says_what_it_needs(s3_store: S3Store) -> None:
    """The error has the action as data."""
    from pydantic import SecretStr

    change = {"access_key": SecretStr(LISTER.access_key), "secret_key": SecretStr(LISTER.secret_key)}
    store = S3Store(s3_store.bucket, "", s3_store._options.model_copy(update=change))
    with pytest.raises(AccessDenied, match="GetObject needs s3:GetObject") as denied:
        store.get("a")
    assert denied.value.permission == "s3:GetObject"
    store.client.close()

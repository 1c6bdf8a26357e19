"""What only S3 has: credentials, buckets that go away, connections that break, uploads in parts."""

from __future__ import annotations

import io
import traceback
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pydantic import SecretStr

from weighbridge.storage import s3_stream
from weighbridge.storage.completeness import Complete, Waiting, look
from weighbridge.storage.errors import (
    AccessDenied,
    BucketNotFound,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from weighbridge.storage.pins import pin
from weighbridge.storage.s3 import S3Store
from weighbridge.storage.seaweed import SeaweedServer
from weighbridge.storage.urls import open_store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BIG = bytes(range(256)) * (6 << 12)  # 6 MiB: two parts


def verbs(store: S3Store) -> list[Callable[[], Any]]:
    return [
        store.check,
        lambda: store.get("a"),
        lambda: store.head("a"),
        lambda: list(store.list()),
        lambda: list(store.entries()),
        lambda: store.uploads(""),
    ]


def test_wrong_credentials_are_denied_and_never_shown(seaweedfs: SeaweedServer, s3_bucket: str) -> None:
    """A wrong secret, and an unknown key, are AccessDenied for every verb; no message or cause has the secret."""
    for change in ({"secret_key": SecretStr("wr0ng-secret")}, {"access_key": SecretStr("nobody")}):
        store = S3Store(s3_bucket, "", seaweedfs.options.model_copy(update=change))
        for verb in [*verbs(store), lambda s=store: s.put("a", b"x"), lambda s=store: s.delete("a")]:
            with pytest.raises(AccessDenied, match=s3_bucket) as caught:
                verb()
            text = "".join(traceback.format_exception(caught.value))
            assert "wr0ng-secret" not in text
            assert seaweedfs.secret_key not in text
        store.client.close()
    assert "wr0ng" not in repr(seaweedfs.options) + repr(S3Store)


def test_a_missing_bucket_is_said_to_be_missing(seaweedfs: SeaweedServer, s3_client: S3Client) -> None:
    """Not merely the object: a checkpoint must not be taken for removed when its bucket is."""
    store = S3Store(f"no-{uuid.uuid4().hex[:8]}", "", seaweedfs.options, client=s3_client)
    for verb in verbs(store):
        with pytest.raises(BucketNotFound, match="bucket does not exist"):
            verb()


def test_a_bucket_that_disappears_and_comes_back(s3_store: S3Store, s3_client: S3Client) -> None:
    """While it is gone every read says so; when it is back the same store works."""
    s3_store.put("a", b"x")
    s3_store.delete("a")
    s3_client.delete_bucket(Bucket=s3_store.bucket)
    for verb in verbs(s3_store):
        with pytest.raises(BucketNotFound):
            verb()
    s3_client.create_bucket(Bucket=s3_store.bucket)
    s3_store.put("a", b"x")
    assert s3_store.get("a") == b"x"


def test_an_unreachable_store_is_unavailable(seaweedfs: SeaweedServer) -> None:
    """A refused connection is something that a retry may cure; the message names the endpoint."""
    gone = seaweedfs.options.model_copy(update={"endpoint_url": "http://127.0.0.1:9", "attempts": 1})
    store = S3Store("bucket", "", gone)
    for verb in verbs(store):
        with pytest.raises(StorageUnavailable, match=r"127\.0\.0\.1:9"):
            verb()
    store.client.close()


def test_without_credentials_access_is_denied(monkeypatch: pytest.MonkeyPatch, seaweedfs: SeaweedServer) -> None:
    """No keys anywhere: said clearly, before any request."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    none = seaweedfs.options.model_copy(update={"access_key": None, "secret_key": None})
    store = S3Store("bucket", "", none)
    with pytest.raises(AccessDenied, match="no usable credentials"):
        store.check()
    store.client.close()


class _Broken:
    """A body that breaks off after a few bytes."""

    def __init__(self, body: Any, good: int) -> None:
        self._body, self._good = body, good

    def read(self, count: int) -> bytes:
        if self._good <= 0:
            raise OSError("connection reset by peer")
        data: bytes = self._body.read(min(count, self._good))
        self._good -= len(data)
        return data

    def close(self) -> None:
        self._body.close()


def _breaking(s3_store: S3Store, monkeypatch: pytest.MonkeyPatch, good: int) -> list[str | None]:
    """Make every GET break after `good` bytes; return the ranges that are asked for."""
    ranges: list[str | None] = []
    get_object = s3_store.client.get_object

    def broken(**request: Any) -> Any:
        ranges.append(request.get("Range"))
        answer = get_object(**request)
        return answer | {"Body": _Broken(answer["Body"], good)}

    monkeypatch.setattr(s3_store.client, "get_object", broken)
    return ranges


def test_a_broken_connection_is_taken_up_where_it_broke(s3_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream goes on by a range from the first missing byte, pinned to the content that it began with."""
    s3_store.put("a", BIG)
    with monkeypatch.context() as patched:
        ranges = _breaking(s3_store, patched, 2 << 20)
        with s3_store.open("a", start=10) as stream:
            assert stream.read() == BIG[10:]
    assert ranges == ["bytes=10-", f"bytes={10 + (2 << 20)}-{len(BIG) - 1}", f"bytes={10 + (4 << 20)}-{len(BIG) - 1}"]


def test_a_resumed_stream_never_mixes_contents(s3_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the object is another when the connection is taken up again, that is PreconditionFailed."""
    s3_store.put("a", BIG)
    with monkeypatch.context() as patched:
        _breaking(s3_store, patched, 1 << 20)
        with s3_store.open("a") as stream:
            s3_store.put("a", BIG[::-1])
            with pytest.raises(PreconditionFailed):
                stream.read()


def test_a_connection_that_always_breaks_is_given_up(s3_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few times the stream says StorageUnavailable instead of ending early."""
    s3_store.put("a", b"x" * 1000)
    with monkeypatch.context() as patched:
        ranges = _breaking(s3_store, patched, 0)
        with s3_store.open("a") as stream, pytest.raises(StorageUnavailable, match="broke"):
            stream.read()
    assert len(ranges) == 1 + s3_stream._RESUMES


def test_open_uploads_are_seen(s3_store: S3Store, s3_client: S3Client) -> None:
    """An unfinished upload in parts holds a checkpoint back, until it is aborted."""
    s3_store.put("digits/run-1/config.json", b"{}")
    key = s3_store.prefix + "digits/run-1/model.safetensors"
    upload = s3_client.create_multipart_upload(Bucket=s3_store.bucket, Key=key)["UploadId"]
    assert s3_store.uploads("digits/") == ["digits/run-1/model.safetensors"]
    assert s3_store.uploads("other/") == []
    verdict = look(s3_store, "digits/run-1/")
    assert isinstance(verdict, Waiting)
    assert "multipart upload of digits/run-1/model.safetensors" in verdict.reason
    s3_client.abort_multipart_upload(Bucket=s3_store.bucket, Key=key, UploadId=upload)
    assert s3_store.uploads("digits/") == []


def test_a_failed_upload_leaves_no_parts(s3_store: S3Store) -> None:
    """An upload whose source breaks is aborted, not left open."""

    class Breaking(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 5 << 20:
                raise RuntimeError("the source broke")
            return super().readinto(buffer)

    with pytest.raises(RuntimeError):
        s3_store.put("a", Breaking(BIG * 2))
    assert s3_store.uploads("") == []
    with pytest.raises(ObjectNotFound):
        s3_store.head("a")


def test_a_presigned_url_reads_without_credentials(s3_store: S3Store) -> None:
    """Anybody with the URL can read this object, and no other."""
    s3_store.put("späße/a b", b"data")
    url = s3_store.presign("späße/a b", expires=60)
    assert httpx.get(url, trust_env=False).content == b"data"
    assert httpx.get(url.replace("a%20b", "other"), trust_env=False).status_code in (403, 404)
    assert "?" not in s3_store.url


def test_sharded_checkpoints_are_judged_by_a_few_ranges(s3_store: S3Store) -> None:
    """Pins of a bucket read back: completeness works on S3 as it does in memory."""
    from fixtures.checkpoints import sharded

    for name, data in sharded().items():
        s3_store.put(f"digits/run-1/{name}", data)
    verdict = look(s3_store, "digits/run-1/")
    assert isinstance(verdict, Complete), verdict
    assert verdict.files == tuple(pin(info) for info in sorted(s3_store.list("digits/run-1/"), key=lambda i: i.key))
    for ref in verdict.files:
        assert s3_store.get(ref.key, if_match=ref) == sharded()[ref.key.rpartition("/")[2]]


def test_urls_open_stores(seaweedfs: SeaweedServer, s3_bucket: str, tmp_path: Any) -> None:
    """Each scheme gives its store; a URL that is none is an error that does not repeat it."""
    store = open_store(f"s3://{s3_bucket}/a/b/", seaweedfs.options)
    store.put("x", b"1")
    assert store.url == f"s3://{s3_bucket}/a/b"
    assert [info.key for info in open_store(f"s3://{s3_bucket}", seaweedfs.options).list()] == ["a/b/x"]
    (tmp_path / "mit leer").mkdir()
    assert open_store((tmp_path / "mit leer").as_uri()).url == open_store(str(tmp_path / "mit leer")).url
    assert open_store("memory://x") is open_store("memory://x") is not open_store("memory://y")
    for wrong in ("http://user:secret@host/x", "s3://key:secret@bucket/x", "s3://", "file://host/x"):
        with pytest.raises(StorageError) as caught:
            open_store(wrong)
        assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_server_keeps_its_data_over_a_kill(tmp_path: Any) -> None:
    """Started again on its folder, a killed server has every acknowledged object; a second stop is no error."""
    server = SeaweedServer(tmp_path / "data")
    with server:
        options = server.options
        store = S3Store("kept", "", options)
        store.client.create_bucket(Bucket="kept")
        store.put("a", BIG)
        server.stop(grace=0)
        store.client.close()
        server.start()
        store = S3Store("kept", "", server.options)
        assert store.get("a") == BIG
        store.client.close()
    server.stop()
    assert server.pid is None

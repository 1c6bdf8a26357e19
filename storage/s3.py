"""Objects in a bucket of S3, MinIO, SeaweedFS, Ceph or R2, through boto3. Imported only where a URL says `s3://`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import boto3.session
import botocore.session
from botocore.config import Config
from botocore.utils import parse_timestamp

from weighbridge import limits
from weighbridge.storage import multipart
from weighbridge.storage.errors import EmptyRange, NotSupported, ObjectNotFound, PreconditionFailed, StorageError
from weighbridge.storage.keys import check_key, check_prefix, fault, is_valid, where_faulty
from weighbridge.storage.listing import check_folder, objects_of
from weighbridge.storage.optional import OptionalCall
from weighbridge.storage.options import S3Options
from weighbridge.storage.protocols import Entry, ObjectInfo, PassedOver, Ref
from weighbridge.storage.s3_calls import S3Calls
from weighbridge.storage.s3_errors import translated
from weighbridge.storage.s3_stream import ResumingBody
from weighbridge.storage.streaming import check_range

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from pydantic import SecretStr


class S3Store:
    """The objects of `bucket` under `prefix`. Thread-safe; make it after a fork, not before.

    Stores of one endpoint may share a `client` (one takes 0.1 s to make). `used` is the folder in it that the keys may
    be limited to: `check` asks for nothing else.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        options: S3Options | None = None,
        *,
        client: S3Client | None = None,
        used: str = "",
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._options = options or S3Options()
        self.client = client or new_client(self._options)
        self._calls = S3Calls(self.client, bucket, self.prefix, self.url, used)

    @property
    def optional(self) -> Sequence[OptionalCall]:
        return self._calls.optional

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".removesuffix("/")

    def check(self) -> None:
        self._calls.check()

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        with self.open(key, start=start, end=end, if_match=if_match) as stream:
            return stream.read()

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        check_range(start, end)
        if end is not None and end == start:
            return self._empty(key, if_match)
        request = self._calls.named(key) | _pinned(if_match)
        if start or end is not None:
            request["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            answer = self._calls.get(key, request)
        except EmptyRange:
            return self._empty(key, if_match)
        except ObjectNotFound:
            self._calls.prove_bucket()
            raise
        if "Range" in request:
            _prove_range(key, answer, start, end)
        body = ResumingBody(partial(self._calls.get, key), request, answer, self.url, key, start=start)
        return io.BufferedReader(body, 1 << 17)

    def head(self, key: str) -> ObjectInfo:
        return self._head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        return objects_of(self.survey(prefix))

    def survey(self, prefix: str = "") -> Iterator[ObjectInfo | PassedOver]:
        told = ""
        with translated(self.url):
            for page in self._pages(prefix):
                for item in page.get("Contents", []):
                    found = self._listed(item)
                    if isinstance(found, ObjectInfo) or (found is not None and found.key != told):
                        told = found.key
                        yield found

    def find(self, key: str) -> ObjectInfo | PassedOver | None:
        name = self._calls.named(key)["Key"]
        with self._translated(key):
            page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=name, MaxKeys=1)
        return next((self._listed(item) for item in page.get("Contents", []) if item.get("Key") == name), None)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        check_folder(prefix)
        with translated(self.url):
            for page in self._pages(prefix, Delimiter="/"):
                for common in page.get("CommonPrefixes", []):
                    key = common["Prefix"][len(self.prefix) :]
                    if is_valid(key.removesuffix("/")):
                        yield Entry(key, None)
                for item in page.get("Contents", []):
                    if isinstance(found := self._listed(item), ObjectInfo):
                        yield Entry(found.key, found)

    def put(self, key: str, data: bytes | IO[bytes] | Path, *, if_none_match: bool = False) -> ObjectInfo:
        if isinstance(data, Path):
            with data.open("rb") as file:
                return self.put(key, file, if_none_match=if_none_match)
        stream = io.BytesIO(data) if isinstance(data, bytes | bytearray | memoryview) else data
        first = multipart.read_full(stream, self._options.part_size)
        if len(first) < self._options.part_size:
            answer = self._calls.put(key, first, if_none_match=if_none_match)
        else:
            answer = self._put_parts(key, first, stream, if_none_match)
        return self._head(key, answer.get("VersionId"))

    def put_in_parts(self, key: str, data: bytes, *, if_none_match: bool = False) -> ObjectInfo:
        answer = self._put_parts(key, data, io.BytesIO(), if_none_match)
        return self._head(key, answer.get("VersionId"))

    @contextmanager
    def unfinished(self, key: str) -> Iterator[None]:
        request = self._calls.named(key)
        with self._translated(key):
            request["UploadId"] = self.client.create_multipart_upload(**request)["UploadId"]
        try:
            yield
        finally:
            with self._translated(key):
                self.client.abort_multipart_upload(**request)

    def copy(self, source: Ref, key: str) -> ObjectInfo:
        self._calls.copies(partial(self._copy_there, source, key), partial(self._copy_through, source, key))
        return self._head(key)

    def delete(self, key: str) -> None:
        with self._translated(key):
            self.client.delete_object(**self._calls.named(key))

    def presign(self, key: str, *, expires: int) -> str:
        with self._translated(key):
            return self.client.generate_presigned_url("get_object", Params=self._calls.named(key), ExpiresIn=expires)

    def uploads(self, prefix: str) -> Sequence[str] | None:
        return self._calls.list_uploads(check_prefix(prefix))

    def _put_parts(self, key: str, first: bytes, rest: IO[bytes], if_none_match: bool) -> Any:
        with self._translated(key):
            return multipart.upload(
                self.client, self.bucket, self.prefix + key, first, rest,
                part_size=self._options.part_size, concurrency=self._options.max_concurrency,
                complete=partial(self._calls.complete, key, if_none_match=if_none_match),
            )  # fmt: skip

    def _copy_there(self, source: Ref, key: str) -> None:
        origin = self._calls.named(source.key) | ({"VersionId": source.version_id} if source.version_id else {})
        with self._translated(key):
            self.client.copy(
                origin,  # type: ignore[arg-type]
                self.bucket,
                self._calls.named(key)["Key"],
                ExtraArgs={"CopySourceIfMatch": f'"{source.etag}"'},
            )

    def _copy_through(self, source: Ref, key: str) -> None:
        with self.open(source.key, if_match=source) as stream:
            self.put(key, stream)

    def _head(self, key: str, version: str | None = None) -> ObjectInfo:
        answer = self._calls.head(key, version)
        return _info(key, answer["ContentLength"], answer, _version(answer))

    def _empty(self, key: str, if_match: Ref | None) -> IO[bytes]:
        """An empty range: still of an object that is there and is the one that was pinned."""
        info = self._head(key, if_match.version_id if if_match else None)
        if if_match is not None and info.etag != if_match.etag:
            raise PreconditionFailed(f"{key} is no longer the content that was pinned", key=key)
        return io.BytesIO()

    def _pages(self, prefix: str, **more: str) -> Iterator[Any]:
        paginator = self.client.get_paginator("list_objects_v2")
        return iter(paginator.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix, **more))  # type: ignore[arg-type]

    def _listed(self, item: Any) -> ObjectInfo | PassedOver | None:
        key, size = item["Key"][len(self.prefix) :], item["Size"]
        if rule := fault(key):
            # Consoles put an empty object for a folder; it holds nothing.
            return PassedOver(where_faulty(key), f"its key cannot be used: {rule}") if size else None
        if not isinstance(item["LastModified"], datetime):
            return PassedOver(key, _undated(item["LastModified"]))
        return _info(key, size, item)

    def _translated(self, key: str) -> Any:
        return translated(self.url, check_key(key))


def new_client(options: S3Options) -> S3Client:
    """A boto3 client with these options. Makes no request."""
    core = botocore.session.Session()
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_moment)
    session = boto3.session.Session(
        botocore_session=core,
        aws_access_key_id=_plain(options.access_key),
        aws_secret_access_key=_plain(options.secret_key),
        aws_session_token=_plain(options.session_token),
    )
    region = options.region or session.region_name or ("us-east-1" if options.endpoint_url else None)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        connect_timeout=options.connect_timeout,
        read_timeout=options.read_timeout,
        max_pool_connections=max(10, 2 * options.max_concurrency),
        s3={"addressing_style": "path" if options.path_style else "virtual"},
        # Newer default checksums break older servers; our own digests prove every byte anyway.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client(
        "s3", endpoint_url=options.endpoint_url, region_name=region, verify=options.verify, config=config
    )


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None


def _info(key: str, size: int, answer: Any, version: str | None = None) -> ObjectInfo:
    """Raises StorageError for a date that is none."""
    modified = answer["LastModified"]
    if not isinstance(modified, datetime):
        raise StorageError(f"{key}: {_undated(modified)}", key=key)
    return ObjectInfo(key, size, answer["ETag"].strip('"'), modified, version)


def _moment(text: Any) -> datetime | str:
    """A date of an answer; as it stands where no calendar has it, so that it costs its own object and no listing."""
    try:
        # Whole seconds: a HEAD knows no more, and one content must not have two times.
        moment = parse_timestamp(text).astimezone(UTC).replace(microsecond=0)
    except (ValueError, OverflowError, OSError, RuntimeError):  # botocore raises all of them
        return str(text)
    return moment if datetime.min.year < moment.year < datetime.max.year else str(text)


def _undated(said: object) -> str:
    return f"the store says that it was written at {limits.quoted(str(said))}, which is no date: copy it onto itself"


def _version(answer: Any) -> str | None:
    """The version id; S3 says `null` for objects written before versioning was on."""
    version = answer.get("VersionId")
    return version if version and version != "null" else None


def _pinned(ref: Ref | None) -> dict[str, str]:
    if ref is None:
        return {}
    return {"IfMatch": f'"{ref.etag}"'} | ({"VersionId": ref.version_id} if ref.version_id else {})


def _prove_range(key: str, answer: Any, start: int, end: int | None) -> None:
    """Raise NotSupported where a store, or a proxy before it, answers a range with the whole object."""
    if answer.get("ContentRange", "").startswith(f"bytes {start}-"):
        return
    if start or (end is not None and answer["ContentLength"] > end):
        answer["Body"].close()
        raise NotSupported(f"{key}: the store answers a range of bytes with the whole object", key=key)

"""The calls that are made of one bucket: their errors ours, and what is done where one of them is not to be had."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.exceptions import ClientError
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from weighbridge.storage.errors import (
    AccessDenied,
    BucketNotFound,
    NotSupported,
    ObjectNotFound,
    PreconditionFailed,
)
from weighbridge.storage.keys import check_key
from weighbridge.storage.optional import OptionalCall
from weighbridge.storage.s3_errors import is_conflict, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
Request = dict[str, Any]


class S3Calls:
    """The calls of `bucket`, for keys below `prefix`. Every one raises StorageError and its kinds.

    `used` is the folder of it that the keys may be limited to.
    """

    def __init__(self, client: S3Client, bucket: str, prefix: str, url: str, used: str = "") -> None:
        self.client, self.bucket, self.prefix, self.url = client, bucket, prefix, url
        self._used = prefix + (f"{used.strip('/')}/" if used.strip("/") else "")
        self.uploads = OptionalCall(
            url,
            "list unfinished multipart uploads",
            without="what is there is judged by itself, whatever is still being uploaded beside it",
            permission="s3:ListBucketMultipartUploads",
        )
        self.versions = OptionalCall(
            url,
            "read an object by its version id",
            without="its ETag alone pins it: a version that was overwritten cannot be read any more",
            permission="s3:GetObjectVersion",
        )
        self.copies = OptionalCall(
            url,
            "copy within the store",
            without="the bytes go through this machine",
            permission="s3:PutObject",
        )
        self.conditions = OptionalCall(
            url,
            "write under a condition (If-None-Match)",
            without="it looks first whether the key is free, which cannot tell two writers of one moment apart",
        )
        self.matches = OptionalCall(
            url, "read under a condition (If-Match)", without="the ETag of every answer is compared"
        )

    @property
    def optional(self) -> tuple[OptionalCall, ...]:
        return self.uploads, self.versions, self.copies, self.conditions, self.matches

    def named(self, key: str) -> Request:
        """The request's part that names an object. Raises InvalidKey."""
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def check(self) -> None:
        with translated(self.url):
            self.client.list_objects_v2(Bucket=self.bucket, Prefix=self._used, MaxKeys=1)

    def prove_bucket(self) -> None:
        """Raise BucketNotFound where it is the bucket that is missing. One that keys may not ask for is there."""
        try:
            with translated(self.url):
                self.client.head_bucket(Bucket=self.bucket)
        except ObjectNotFound as error:
            raise BucketNotFound(f"{self.url}: the bucket does not exist") from error
        except (AccessDenied, NotSupported):
            with suppress(AccessDenied):
                self.check()

    def head(self, key: str, version: str | None = None) -> Any:
        request = self.named(key) | ({"VersionId": version} if version else {})
        try:
            return self._of_version(partial(self._once, self.client.head_object, key), request)
        except ObjectNotFound:
            self.prove_bucket()  # a HEAD's 404 does not say what is missing
            raise

    def get(self, key: str, request: Request) -> Any:
        """A GET of what the request pins, and of nothing else, whatever the store makes of the condition."""
        return self._of_version(partial(self._get_matching, key), request)

    def _get_matching(self, key: str, request: Request) -> Any:
        get = partial(self._once, self.client.get_object, key)
        if "IfMatch" not in request:
            return get(request)
        answer = self.matches(lambda: get(request), lambda: get(_without(request, "IfMatch")))
        if answer["ETag"].strip('"') != request["IfMatch"].strip('"'):
            answer["Body"].close()
            raise PreconditionFailed(f"{key} is no longer the content that was pinned", key=key)
        return answer

    def _of_version(self, call: Callable[[Request], Any], request: Request) -> Any:
        """Of the version that the request names, or of the newest one where the keys may not name versions."""
        if "VersionId" not in request:
            return call(request)
        return self.versions(lambda: call(request), lambda: call(_without(request, "VersionId")))

    def put(self, key: str, data: bytes, *, if_none_match: bool) -> Any:
        return self._once_only(key, self.client.put_object, self.named(key) | {"Body": data}, if_none_match)

    def complete(self, key: str, request: Request, *, if_none_match: bool) -> Any:
        """The last call of an upload in parts."""
        return self._once_only(key, self.client.complete_multipart_upload, request, if_none_match)

    def _once_only(self, key: str, verb: Callable[..., Any], request: Request, if_none_match: bool) -> Any:
        """Write; with `if_none_match` only if nothing has the key, looking first where the store knows no condition."""
        write = partial(self._once, _patiently(verb), key)
        if not if_none_match:
            return write(request)

        def look_first() -> Any:
            try:
                self.head(key)
            except ObjectNotFound:
                return write(request)
            raise PreconditionFailed(f"{key} is already there", key=key)

        return self.conditions(lambda: write(request | {"IfNoneMatch": "*"}), look_first)

    def list_uploads(self, prefix: str) -> list[str] | None:
        """The keys of unfinished uploads; None where nobody can tell."""
        return self.uploads(partial(self._list_uploads, prefix), lambda: None)

    def _list_uploads(self, prefix: str) -> list[str] | None:
        pages = self.client.get_paginator("list_multipart_uploads")
        try:
            with translated(self.url, prefix):
                found = [
                    upload.get("Key", "")[len(self.prefix) :]
                    for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
                    for upload in page.get("Uploads", [])
                ]
        except ObjectNotFound as error:  # no object was asked for: it is the call that is not there
            raise NotSupported(f"{self.url}: the store does not list unfinished uploads") from error
        return sorted({key for key in found if key.startswith(prefix)})

    def _once(self, verb: Callable[..., Any], key: str, request: Request) -> Any:
        with translated(self.url, key):
            return verb(**request)


def _without(request: Request, name: str) -> Request:
    return {field: value for field, value in request.items() if field != name}


_patiently = retry(
    retry=retry_if_exception(lambda error: isinstance(error, ClientError) and is_conflict(error)),
    stop=stop_after_attempt(5),
    wait=wait_random_exponential(0.05, max=1),
    reraise=True,
)
"""Makes a write again while another one of the same key is under way (409)."""

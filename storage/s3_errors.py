"""botocore's errors, translated once into ours. Messages carry codes and names, never credentials or signed URLs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from weighbridge.storage.errors import (
    AccessDenied,
    BucketNotFound,
    EmptyRange,
    NotSupported,
    ObjectArchived,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageFull,
    StorageUnavailable,
)

_WRONG_KEYS = {
    *("AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId"),
    *("SignatureDoesNotMatch", "RequestTimeTooSkewed", "AccountProblem", "NotSignedUp", "401"),
}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_DENIED = {"AccessDenied", "Forbidden", "403"}
_UNKNOWN_CALL = {"NotImplemented", "XNotImplemented", "MethodNotAllowed", "UnsupportedOperation", "405", "501"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage", "507"}
_CHANGED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_BUSY = {"SlowDown", "TooManyRequests", "Throttling", "RequestTimeout", "InternalError", "ServiceUnavailable"}
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)

_UNREACHABLE = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
)

PERMISSIONS: Mapping[str, str] = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CopyObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "UploadPartCopy": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}
"""The IAM action that allows an operation. (One that names a version needs `s3:GetObjectVersion` for it.)"""

_NAMED = re.compile(r"not authorized to perform:? ([a-z0-9-]+:[A-Za-z]+)")
"""How AWS itself names the action, which may be another one: a bucket's key may want `kms:GenerateDataKey`."""


@contextmanager
def translated(url: str, key: str | None = None) -> Iterator[None]:
    """Raise a StorageError for every botocore error within; `url` and `key` name what was asked for."""
    what = f"{url}: {key}" if key else url
    try:
        yield
    except boto.ClientError as error:
        raise _of_response(error, what, key) from error
    except _NO_CREDENTIALS as error:
        raise AccessDenied(f"{what}: no usable credentials were found", key=key) from error
    except _UNREACHABLE as error:
        raise StorageUnavailable(f"{what}: {_plain(error)}", key=key) from error
    except (boto.BotoCoreError, ResponseParserError) as error:
        raise StorageError(f"{what}: {_plain(error)}", key=key) from error


def is_conflict(error: boto.ClientError) -> bool:
    """Say whether another conditional write was under way: 409, the one answer that asks to be tried again."""
    return _code(error) == "ConditionalRequestConflict" or _status(error) == 409


def _of_response(error: boto.ClientError, what: str, key: str | None) -> StorageError:
    code, status = _code(error), _status(error)
    if code == "NoSuchBucket":
        return BucketNotFound(f"{what}: the bucket does not exist", key=key)
    if code in ("NoSuchKey", "NoSuchVersion", "NotFound", "404"):
        return ObjectNotFound(f"{what}: there is no such object", key=key)
    if code in ("InvalidRange", "416") or status == 416:
        return EmptyRange(f"{what}: the range begins behind its end", key=key)
    if code in _CHANGED or status == 412:
        return PreconditionFailed(f"{what}: the condition does not hold ({code})", key=key)
    if code in _WRONG_KEYS or status == 401:
        return AccessDenied(f"{what}: the store refused the credentials ({code})", key=key)
    if code in _ELSEWHERE:
        return AccessDenied(f"{what}: the bucket is in another region ({code}): set storage.s3.region", key=key)
    if code in _UNKNOWN_CALL or status in (405, 501):
        return NotSupported(f"{what}: the store does not support {error.operation_name} ({code or status})", key=key)
    if code == "InvalidObjectState":
        return ObjectArchived(f"{what}: it is archived (Glacier): restore it, and it is looked at again", key=key)
    if code in _DENIED or status == 403:
        return _denied(error, what, key)
    if code in _FULL or status == 507:
        return StorageFull(f"{what}: no space left or over quota ({code})", key=key)
    if code in _BUSY or status == 429 or status >= 500:
        return StorageUnavailable(f"{what}: the store is not able to answer ({code or status})", key=key)
    return StorageError(f"{what}: the store answered {code or status}", key=key)


def _denied(error: boto.ClientError, what: str, key: str | None) -> AccessDenied:
    """The credentials may be good and not allow the call. A HEAD's answer has no words, so that it may also be they."""
    named = _NAMED.search(str(error.response.get("Error", {}).get("Message", "")))
    permission = named[1] if named else PERMISSIONS.get(error.operation_name)
    needs = f": {error.operation_name} needs {permission}" if permission else ""
    said = f"{what}: the store refused the credentials or the call ({_code(error)}){needs}"
    return AccessDenied(said, key=key, permission=permission)


def _code(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _plain(error: Exception) -> str:
    """The error's own text; an endpoint's name is no secret, a query string may be."""
    return f"{type(error).__name__}: {error}".partition("?")[0]

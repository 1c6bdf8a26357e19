"""botocore's errors, translated once into ours. Messages carry codes and names, never credentials or signed URLs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from botocore import exceptions as boto

from weighbridge.storage.errors import (
    AccessDenied,
    BucketNotFound,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageFull,
    StorageUnavailable,
)

_DENIED = {
    *("AccessDenied", "AllAccessDisabled", "ExpiredToken", "Forbidden", "InvalidAccessKeyId", "InvalidToken"),
    *("SignatureDoesNotMatch", "RequestTimeTooSkewed", "AccountProblem", "401", "403"),
}
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
    except boto.BotoCoreError as error:
        raise StorageError(f"{what}: {_plain(error)}", key=key) from error


def is_range_error(error: boto.ClientError) -> bool:
    """Say whether a range began behind the end of the object."""
    return _code(error) in ("InvalidRange", "416") or _status(error) == 416


def is_conflict(error: boto.ClientError) -> bool:
    """Say whether another conditional write was under way: 409, the one answer that asks to be tried again."""
    return _code(error) == "ConditionalRequestConflict" or _status(error) == 409


def _of_response(error: boto.ClientError, what: str, key: str | None) -> StorageError:
    code, status = _code(error), _status(error)
    if code == "NoSuchBucket":
        return BucketNotFound(f"{what}: the bucket does not exist", key=key)
    if code in ("NoSuchKey", "NoSuchVersion", "NotFound", "404"):
        return ObjectNotFound(f"{what}: there is no such object", key=key)
    if code in _CHANGED or status == 412:
        return PreconditionFailed(f"{what}: the condition does not hold ({code})", key=key)
    if code in _DENIED or status in (401, 403):
        return AccessDenied(f"{what}: the store refused the credentials or the call ({code})", key=key)
    if code in _FULL or status == 507:
        return StorageFull(f"{what}: no space left or over quota ({code})", key=key)
    if code in _BUSY or status == 429 or status >= 500:
        return StorageUnavailable(f"{what}: the store is not able to answer ({code or status})", key=key)
    return StorageError(f"{what}: the store answered {code or status}", key=key)


def _code(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _plain(error: Exception) -> str:
    """The error's own text; an endpoint's name is no secret, a query string may be."""
    return f"{type(error).__name__}: {error}".partition("?")[0]

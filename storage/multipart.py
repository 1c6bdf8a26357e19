"""Large objects to S3 in parts: conditional, whole or nothing, memory bounded by the parts in flight.

s3transfer has no If-None-Match and does not say which version it wrote; hence these few lines.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from weighbridge.storage.streaming import read_into

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

log = logging.getLogger(__name__)

MAX_PARTS = 10_000


def upload(
    client: S3Client,
    bucket: str,
    key: str,
    first: bytes,
    rest: IO[bytes],
    *,
    part_size: int,
    concurrency: int,
    complete: Callable[[dict[str, Any]], Any],
) -> Any:
    """Send `first` (a full part, or all there is) and then `rest`; abort on any error, so that nothing of it shows.

    `complete` makes the last call, with this request; its answer is returned. Raises botocore's errors, what `complete`
    raises, and those of reading `rest`.
    """
    target = {"Bucket": bucket, "Key": key}
    target["UploadId"] = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    try:
        parts = _send(client, bucket, key, target["UploadId"], _parts(first, rest, part_size), concurrency)
        return complete({**target, "MultipartUpload": {"Parts": parts}})
    except BaseException:
        _abort(client, target)
        raise


def _abort(client: S3Client, target: dict[str, str]) -> None:
    """Take the parts back. What went wrong before is the error to tell, not that they stay."""
    try:
        client.abort_multipart_upload(**target)  # type: ignore[arg-type]
    except (ClientError, BotoCoreError) as error:
        what = f"s3://{target['Bucket']}/{target['Key']}"
        log.warning("%s: parts of a broken upload stay there until a rule of the bucket removes them: %s", what, error)


def _send(
    client: S3Client, bucket: str, key: str, upload_id: str, parts: Iterator[bytes], concurrency: int
) -> list[CompletedPartTypeDef]:
    def send(number: int, body: bytes) -> CompletedPartTypeDef:
        answer = client.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    done: list[CompletedPartTypeDef] = []
    flying: deque[Future[CompletedPartTypeDef]] = deque()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="multipart") as pool:
        for number, body in enumerate(parts, start=1):
            if number > MAX_PARTS:
                raise ValueError(f"{key} needs more than {MAX_PARTS} parts: raise the part size")
            if len(flying) >= concurrency:
                done.append(flying.popleft().result())
            flying.append(pool.submit(send, number, body))
        done.extend(future.result() for future in flying)
    return done


def _parts(first: bytes, rest: IO[bytes], size: int) -> Iterator[bytes]:
    yield first
    while part := read_full(rest, size):
        yield part


def read_full(stream: IO[bytes], size: int) -> bytes:
    """Read exactly `size` bytes, fewer only at the end of the stream."""
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size and (count := read_into(stream, view[filled:])):
        filled += count
    view.release()
    del buffer[filled:]
    return bytes(buffer)

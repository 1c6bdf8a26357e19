"""Large objects to S3 in parts: conditional, whole or nothing, memory bounded by the parts in flight.

s3transfer has no If-None-Match and does not say which version it wrote; hence these few lines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

from weighbridge.storage.streaming import read_into

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, CompleteMultipartUploadOutputTypeDef

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
    if_none_match: bool,
) -> CompleteMultipartUploadOutputTypeDef:
    """Send `first` (one full part) and then `rest`; abort on any error, so that nothing of it ever shows.

    Raises botocore's errors and those of reading `rest`.
    """
    upload_id = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    try:
        parts = _send(client, bucket, key, upload_id, _parts(first, rest, part_size), concurrency)
        if if_none_match:
            return client.complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        return client.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
        )
    except BaseException:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        raise


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

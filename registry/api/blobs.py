"""Blobs: read by digest, in ranges, by whom they are meant for; uploaded by administrators."""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import IO, Annotated

from blake3 import blake3
from fastapi import APIRouter, Header, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response, StreamingResponse

from weighbridge.registry import hosts
from weighbridge.registry.api import bodies
from weighbridge.registry.api.auth import Admin, Fetcher
from weighbridge.registry.api.context import Context, Ctx, Digest
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.errors import Forbidden, Invalid, Malformed, NotFound
from weighbridge.registry.tokens import Principal
from weighbridge.storage import disk_errors
from weighbridge.storage.errors import DigestMismatch, ObjectNotFound
from weighbridge.storage.protocols import Presign

router = APIRouter(prefix="/v1/blobs", tags=["blobs"], route_class=Guarded)
_CHUNK = 1 << 20
_BYTES = "application/octet-stream"
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")
_DIGITS = re.compile(r"\d{19}")


@router.get("/{digest}", response_class=Response)
async def get_blob(ctx: Ctx, who: Fetcher, digest: Digest, range: Annotated[str | None, Header()] = None) -> Response:
    """A blob's bytes, or those of one `Range`; or 307 to a presigned link, where the settings say so.

    The whole is hashed: one that is damaged is 422 where it is small; of a large one the end is held back and the
    connection aborted. A range cannot be checked: whoever puts one together hashes the whole.
    """
    size = await run_in_threadpool(_check, ctx, who, digest)
    store = ctx.blobs.store
    if ctx.settings.presign_seconds and isinstance(store, Presign):
        link = await run_in_threadpool(store.presign, ctx.blobs.key(digest), expires=ctx.settings.presign_seconds)
        return RedirectResponse(link, 307, headers={"cache-control": "no-store"})
    start, end = _range(range, size)
    headers = {"content-length": str(end - start), "accept-ranges": "bytes", "etag": f'"{digest}"'}
    if (start, end) == (0, size) and size <= _CHUNK:
        data = await run_in_threadpool(ctx.blobs.get, digest)
        return Response(data, headers=headers, media_type=_BYTES)
    stream = await run_in_threadpool(ctx.blobs.open, digest, start=start, end=end)
    partial = {"content-range": f"bytes {start}-{end - 1}/{size}"} if (start, end) != (0, size) else {}
    return StreamingResponse(
        _chunks(stream) if partial else _verified(stream, digest),
        status_code=206 if partial else 200,
        headers=headers | partial,
        media_type=_BYTES,
    )


def _check(ctx: Context, who: Principal, digest: str) -> int:
    """The blob's size, for whom it is meant. A host learns nothing of other blobs, not even whether they are there."""
    if who.role == "host":
        with ctx.db.read() as tx:
            if who.host_id is None or not hosts.may_fetch(tx, who.host_id, digest):
                raise Forbidden(f"blob {digest} is not part of what host {who.host_id} is assigned")
    try:
        return ctx.blobs.size(digest)
    except ObjectNotFound as error:
        raise NotFound("blob", digest) from error


def _range(header: str | None, size: int) -> tuple[int, int]:
    """The bytes [start, end) that are wanted: all of them for what is no plain range. 416 behind the blob's end."""
    if _DIGITS.search(header or ""):
        raise Malformed("Range holds a number of more digits than any blob has bytes")
    found = _RANGE.fullmatch((header or "").strip())
    if not found:
        return 0, size
    start, last = int(found[1]), int(found[2]) if found[2] else size - 1
    if start >= size or last < start:
        raise HTTPException(416, f"the blob has {size} bytes", headers={"content-range": f"bytes */{size}"})
    return start, min(last + 1, size)


async def _chunks(stream: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while data := await run_in_threadpool(stream.read, _CHUNK):
            yield data
    finally:
        stream.close()


async def _verified(stream: IO[bytes], digest: str) -> AsyncIterator[bytes]:
    """A whole blob, a chunk behind; its last one only where the digest is right. Raises DigestMismatch."""
    hasher, held = blake3(), b""
    async for data in _chunks(stream):
        if held:
            yield held
        await run_in_threadpool(hasher.update, data)
        held = data
    if (seen := hasher.hexdigest()) != digest:
        said = f"blob {digest} is damaged in the store: its digest is {seen}; the answer is broken off"
        raise DigestMismatch(said, expected=digest, seen=seen, key=digest)
    yield held


@router.put("/{digest}", status_code=204)
async def put_blob(ctx: Ctx, _: Admin, digest: Digest, request: Request) -> None:
    """Store bytes that have this digest; nothing ever loads them here. 413 over `max_upload_bytes`."""
    with tempfile.NamedTemporaryFile(prefix="weighbridge-upload-") as file:
        path = FilePath(file.name)
        with disk_errors.translated(path.parent, path.name):
            seen = await _spool(bodies.upload(request, ctx.settings.max_upload_bytes), file)
        if seen != digest:
            raise Invalid(f"the bytes that came have the digest {seen}, not {digest}")
        await run_in_threadpool(ctx.blobs.put_file, path)


async def _spool(parts: AsyncIterator[bytes], file: IO[bytes]) -> str:
    hasher = blake3()
    async for chunk in parts:
        hasher.update(chunk)
        await run_in_threadpool(file.write, chunk)
    await run_in_threadpool(file.flush)
    return hasher.hexdigest()

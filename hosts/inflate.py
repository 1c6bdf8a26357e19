"""Undoes a body's Content-Encoding, piece by piece and within a budget: what is packed is only a claim of its sender.

It happens in the front, before a child sees anything, because the front counts the memory of bodies. One piece takes
about a millisecond, and others have their turn between two.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator

from weighbridge.hosts.errors import BadRequest, TooLarge, UnsupportedEncoding

UNPACKED_AT_ONCE = 1 << 18
"""Bytes of a piece."""
FREE = 1 << 20
"""Bytes up to which a body may be packed as tightly as it likes: an image of one colour is."""
_WINDOWS = {"gzip": zlib.MAX_WBITS | 32, "x-gzip": zlib.MAX_WBITS | 32, "deflate": zlib.MAX_WBITS | 32}
"""zlib's window bits of the codings that are undone; 32: gzip or zlib by its own header."""
_MOST_MEMBERS = 1024


def coding(encoding: str) -> str:
    """The one coding that a Content-Encoding names; "" for none. Raises UnsupportedEncoding, for several as well."""
    codings = [word for part in encoding.split(",") if (word := part.strip().lower()) not in ("", "identity")]
    if unknown := [word for word in codings if word not in _WINDOWS]:
        raise UnsupportedEncoding(f"Content-Encoding {unknown[0][:40]!r}: identity, gzip and deflate are understood")
    if len(codings) > 1:
        raise UnsupportedEncoding(f"Content-Encoding names {len(codings)} codings: one is undone")
    return codings[0] if codings else ""


def pieces(body: bytes | bytearray, coding: str, most: int, ratio: int) -> Iterator[bytes]:
    """The plain body in pieces. Raises BadRequest; TooLarge beyond `most` bytes, or `ratio` times the packed ones."""
    most, size = min(most, max(FREE, ratio * len(body))), 0
    for piece in _members(memoryview(body), coding):
        if (size := size + len(piece)) > most:
            raise TooLarge(
                f"the body unpacks to more than {most} bytes, {ratio} times its size or this host's largest body "
                "(max_inflation, max_body_bytes): send it plain, or less at once"
            )
        yield piece


def _members(body: memoryview, coding: str) -> Iterator[bytes]:
    """All gzip members in a row, or the one deflate stream."""
    if not body:
        raise BadRequest(f"the {coding} body is empty")
    members = 0
    while body:
        members += 1
        if members > (1 if coding == "deflate" else _MOST_MEMBERS):
            raise BadRequest(f"the {coding} body is followed by other bytes, or has over {_MOST_MEMBERS} members")
        body = yield from _member(body, coding)


def _member(body: memoryview, coding: str) -> Generator[bytes, None, memoryview]:
    """Inflate one member; what follows it."""
    stream = zlib.decompressobj(_window(body, coding))
    at, kept = 0, b""
    while not stream.eof:
        fed = kept or body[at : at + UNPACKED_AT_ONCE]
        at += 0 if kept else len(fed)
        try:
            piece = stream.decompress(fed, UNPACKED_AT_ONCE)
        except zlib.error as exc:
            raise BadRequest(f"the body is no {coding}: {exc}") from exc
        if not piece and not fed and not stream.eof:
            raise BadRequest(f"the {coding} body is cut short")
        kept = stream.unconsumed_tail
        yield piece
    rest = body[at - len(stream.unused_data) :]
    return rest if bytes(rest[:UNPACKED_AT_ONCE]).strip(b"\0") else memoryview(b"")  # gzip's padding is zeros


def _window(body: memoryview, coding: str) -> int:
    """zlib's window bits. `deflate` should have zlib's header; some clients leave it out, as they always did."""
    if coding == "deflate" and (body[0] & 0x0F != 8 or (body[0] << 8 | (body[1] if len(body) > 1 else 0)) % 31):
        return -zlib.MAX_WBITS
    return _WINDOWS[coding]

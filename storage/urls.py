"""A store from its URL. Every part of a URL is used or refused: what is dropped silently watches another folder."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from weighbridge.storage.errors import MissingDependency, StorageError
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.options import S3Options
from weighbridge.storage.protocols import Store

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_OURS = ("file", "s3", "memory")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_ESCAPED = re.compile(r"%[0-9A-Fa-f]{2}")


def open_store(
    url: str, options: S3Options | None = None, *, create: bool = False, below: str = "", used: str = ""
) -> Store:
    """Return the store of `memory://name`, `file:///path`, a plain path, or `s3://bucket/prefix`.

    `below` is a folder in it, as it is spelled there, in which the store begins; `used` is the folder of it that the
    keys may be limited to. Makes no request; `create` makes a missing folder. Raises StorageError for another URL,
    naming the part that has no meaning, MissingDependency.
    """
    scheme = _SCHEME.match(url)
    if scheme is None or not (scheme[2] or scheme[1].lower() in _OURS):
        return FolderStore(_path(url) / below, create=create, used=used)
    if fault := _unprintable(url) or (None if scheme[2] else f"it needs '//' after {scheme[1]}:"):
        raise _unusable(scheme[1], fault)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _unusable(scheme[1], "its host is none") from error
    if fault := _fault(url, parts):
        raise _unusable(parts.scheme, fault)
    match parts.scheme:
        case "memory":
            return MemoryStore.named("/".join(filter(None, (parts.netloc + parts.path, below))))
        case "file":
            root = _path(unquote(parts.path, errors="surrogateescape")) / below
            return FolderStore(root, create=create, used=used)
        case _:
            return _s3(parts.netloc, "/".join(filter(None, (parts.path.strip("/"), below))), options, used)


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise StorageError("a folder's path is empty or has a NUL character")
    return Path(text).expanduser()


def _unusable(scheme: str, fault: str) -> StorageError:
    # The URL itself is not repeated: people put keys into URLs.
    return StorageError(
        f"cannot open a {scheme}:// URL of this form: {fault}; "
        "use s3://bucket/prefix, file:///path, a plain path or memory://name"
    )


def _unprintable(url: str) -> str | None:
    """urlsplit drops line breaks and tabs, and spaces at the ends, without a word."""
    return "it has spaces around it, or control characters" if url != url.strip() or not url.isprintable() else None


def _fault(url: str, parts: SplitResult) -> str | None:
    """What in a URL has no meaning here, and how to say it otherwise; None where all has one."""
    if parts.scheme not in _OURS:
        return f"{parts.scheme} is no kind of store"
    if "@" in parts.netloc:
        return "a user or a password in it is not read: keys stand in the storage.s3 settings"
    literal = "%23 and %3F" if parts.scheme == "file" else "storage.prefix, in which every character counts,"
    if "#" in url or "?" in url:
        return f"'#' and '?' mean a fragment and a query: write {literal} where a name has them"
    return {"file": _file_fault, "s3": _s3_fault, "memory": _memory_fault}[parts.scheme](parts)


def _file_fault(parts: SplitResult) -> str | None:
    if parts.netloc not in ("", "localhost"):
        return "a folder lies on this machine: file:/// has three slashes, and no host or port"
    return None if parts.path.strip("/") or parts.path == "/" else "it has no path"


def _s3_fault(parts: SplitResult) -> str | None:
    if ":" in parts.netloc:
        return "a port is not read: the endpoint is storage.s3.endpoint_url"
    if not _BUCKET.fullmatch(parts.netloc):
        return "it has no bucket's name after s3://"
    if "//" in parts.path:
        return "its prefix has an empty part ('//')"
    if _ESCAPED.search(parts.path):
        return "a '%' code in a prefix is not decoded: write storage.prefix, in which every character counts"
    return None


def _memory_fault(parts: SplitResult) -> str | None:
    return None if parts.netloc or parts.path else "it has no name"


def _s3(bucket: str, prefix: str, options: S3Options | None, used: str) -> Store:
    try:
        from weighbridge.storage.s3 import S3Store
    except ModuleNotFoundError as error:
        raise MissingDependency("s3:// needs boto3: pip install 'weighbridge[s3]'") from error
    return S3Store(bucket, prefix, options, used=used)

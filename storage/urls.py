"""A store from its URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from weighbridge.storage.errors import MissingDependency, StorageError
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.options import S3Options
from weighbridge.storage.protocols import Store


def open_store(url: str, options: S3Options | None = None, *, create: bool = False) -> Store:
    """Return the store of `memory://name`, `file:///path`, a plain path, or `s3://bucket/prefix`.

    Makes no request; `create` makes a missing folder. Raises StorageError for another URL, MissingDependency.
    """
    if "://" not in url:
        return FolderStore(Path(url).expanduser(), create=create)
    parts = urlsplit(url)
    match parts.scheme:
        case "memory":
            return MemoryStore.named(parts.netloc + parts.path)
        case "file" if parts.netloc in ("", "localhost") and parts.path:
            return FolderStore(Path(unquote(parts.path)), create=create)
        case "s3" if parts.netloc and "@" not in parts.netloc and not parts.query:
            return _s3(parts.netloc, parts.path, options)
    # The URL itself is not repeated: people put keys into URLs.
    raise StorageError(
        f"cannot open a {parts.scheme}:// URL of this form: "
        "use s3://bucket/prefix, file:///path, a plain path or memory://name"
    )


def _s3(bucket: str, prefix: str, options: S3Options | None) -> Store:
    try:
        from weighbridge.storage.s3 import S3Store
    except ModuleNotFoundError as error:
        raise MissingDependency("s3:// needs boto3: pip install 'weighbridge[s3]'") from error
    return S3Store(bucket, prefix, options)

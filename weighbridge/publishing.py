"""`weighbridge.publish`: as `storage.publish`, with stores by URL, opened as every command and process opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from weighbridge.storage.arrays import Tensors
from weighbridge.storage.publish import Progress, PublishResult
from weighbridge.storage.publish import publish as publish_to

if TYPE_CHECKING:
    from weighbridge.storage.protocols import Store


def publish(
    source: Path | str | Tensors,
    model: str,
    name: str,
    *,
    store: Store | str,
    golden: Path | str | Tensors | None = None,
    metadata: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> PublishResult:
    """Write the checkpoint `<model>/<name>/` and, last, the manifest that makes it complete.

    `source` is a safetensors file, a folder, or tensors by name; `golden` is a file or arrays named `input.<name>` and
    `output.<name>`. `store` is a folder or s3://BUCKET/PREFIX, reached as the settings say: endpoint, region and keys
    from WEIGHBRIDGE_STORAGE__S3__…, `weighbridge.toml`, else boto3's own chain. `metadata` (a commit, a run) is kept
    with the version, `tags` become its tags. A try that broke off can be repeated under the same name; of several at
    once one publishes, and the others send nothing.
    Raises, before anything is sent, InvalidName, NotPublishable, InvalidMetadata, AlreadyPublished, MissingDependency
    (tensors need safetensors), ConfigError; and what the store raises.
    """
    target = open_store(store) if isinstance(store, str) else store
    return publish_to(source, model, name, store=target, golden=golden, metadata=metadata, tags=tags, progress=progress)


def open_store(url: str) -> Store:
    """The store of a URL, with the settings' way to reach it. Raises ConfigError, StorageError."""
    from weighbridge.settings import load
    from weighbridge.storage import urls

    return urls.open_store(url, load().storage.s3 if url.startswith("s3:") else None)

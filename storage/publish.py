"""Put a checkpoint into a store so that nobody can take a part of it for the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weighbridge.storage import claims, lineage, names
from weighbridge.storage.arrays import Tensors
from weighbridge.storage.claims import Claim
from weighbridge.storage.errors import AlreadyPublished, ObjectNotFound, PreconditionFailed
from weighbridge.storage.protocols import Store
from weighbridge.storage.published import Published, PublishedFile
from weighbridge.storage.sources import gathered
from weighbridge.storage.streaming import DigestingReader, digest_bytes

Progress = Callable[[str, int, int], None]
"""Called as bytes are sent: the file's path, the bytes of all files done so far, the bytes of all files."""


@dataclass(frozen=True, slots=True)
class PublishResult:
    """What was published: `path` is the folder's key in the store, `digest` that of its `weighbridge.json`."""

    model: str
    name: str
    path: str
    digest: str
    files: tuple[PublishedFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def publish(
    source: Path | str | Tensors,
    model: str,
    name: str,
    *,
    store: Store,
    golden: Path | str | Tensors | None = None,
    metadata: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> PublishResult:
    """Write the checkpoint `<model>/<name>/` and, last, the manifest that makes it complete.

    `source` is a safetensors file, a folder, or tensors by name; `golden` is a file or arrays named `input.<name>` and
    `output.<name>`. `metadata` (a commit, a run) is kept with the version, `tags` become its tags. A try that broke off
    can be repeated under the same name; of several at once one publishes, and the others send nothing.
    Raises, before anything is sent, InvalidName, NotPublishable, InvalidMetadata, AlreadyPublished, MissingDependency
    (tensors need safetensors); and what the store raises.
    """
    folder = f"{names.check_model(model)}/{names.check_checkpoint(name)}/"
    said, wished = lineage.check(metadata, "metadata"), lineage.check(tags, "tag")
    _prove_free(store, folder)
    with gathered(source, golden) as paths, _claimed(store, folder) as claim:
        _prove_free(store, folder)  # again: one may have ended while this one claimed the name
        files = _send(store, folder, paths, claim, progress)
        manifest = Published(files=files, metadata=said, tags=wished).canonical()
        try:
            store.put(folder + names.PUBLISHED, manifest, if_none_match=True)
        except PreconditionFailed as error:
            raise _taken(store, folder) from error
    return PublishResult(model, name, folder, digest_bytes(manifest), files)


@contextmanager
def _claimed(target: Store, folder: str) -> Iterator[Claim]:
    claim = claims.take(target, folder)
    try:
        yield claim
    except AlreadyPublished:
        claim.release()  # nothing of ours is left there that must be marked
        raise
    except BaseException:
        claim.give_up()
        raise
    claim.release()


def _send(
    target: Store, folder: str, paths: Mapping[str, Path], claim: Claim, progress: Progress | None
) -> tuple[PublishedFile, ...]:
    """Store every file, digesting it on the way: the manifest names the bytes that were sent."""
    done, total = 0, sum(path.stat().st_size for path in paths.values())
    sent = []
    for path in sorted(paths):

        def count(size: int, path: str = path) -> None:
            nonlocal done
            done += size
            claim.renew()
            if progress is not None:
                progress(path, done, total)

        claim.prove()
        with paths[path].open("rb") as file:
            reader = DigestingReader(file, size=paths[path].stat().st_size, progress=count)
            target.put(folder + path, reader)  # type: ignore[arg-type]
        sent.append(PublishedFile(path=path, size=reader.size, digest=reader.digest))
    claim.prove()
    return tuple(sent)


def _prove_free(target: Store, folder: str) -> None:
    try:
        target.head(folder + names.PUBLISHED)
    except ObjectNotFound:
        return
    raise _taken(target, folder)


def _taken(target: Store, folder: str) -> AlreadyPublished:
    key = folder + names.PUBLISHED
    return AlreadyPublished(f"{target.url}: {folder} is already published: choose another name", key=key)

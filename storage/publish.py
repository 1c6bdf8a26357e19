"""Put a checkpoint into a store so that nobody can take a part of it for the whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weighbridge.storage import claims, names
from weighbridge.storage.claims import Claim
from weighbridge.storage.errors import (
    AlreadyPublished,
    InvalidName,
    MissingDependency,
    ObjectNotFound,
    PreconditionFailed,
)
from weighbridge.storage.keys import check_key
from weighbridge.storage.protocols import Store
from weighbridge.storage.published import Published, PublishedFile
from weighbridge.storage.streaming import DigestingReader, digest_bytes

Tensors = Mapping[str, Any]
"""Arrays by tensor name: numpy arrays, torch tensors, or whatever numpy can make an array of."""

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
    progress: Progress | None = None,
) -> PublishResult:
    """Write the checkpoint `<model>/<name>/` and, last, the manifest that makes it complete.

    `source` is a safetensors file, a folder, or tensors by name; `golden` is a file or arrays named `input.<name>` and
    `output.<name>`. A try that broke off can be repeated under the same name; of several at once one publishes, and the
    others send nothing.
    Raises InvalidName, AlreadyPublished, MissingDependency (tensors need safetensors), and what the store raises.
    """
    folder = f"{names.check_model(model)}/{names.check_checkpoint(name)}/"
    _prove_free(store, folder)
    with _gathered(source, golden) as paths, _claimed(store, folder) as claim:
        _prove_free(store, folder)  # again: one may have ended while this one claimed the name
        files = _send(store, folder, paths, claim, progress)
        manifest = Published(files=files, metadata=dict(metadata or {})).canonical()
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


@contextmanager
def _gathered(source: Path | str | Tensors, golden: Path | str | Tensors | None) -> Iterator[dict[str, Path]]:
    """The files to send, by their path in the checkpoint; tensors become temporary files."""
    with tempfile.TemporaryDirectory(prefix="weighbridge-publish-") as scratch:
        paths = _files(source, Path(scratch))
        if golden is not None:
            paths[names.GOLDEN] = _one_file(golden, Path(scratch) / names.GOLDEN)
        if not any(names.is_weights(path) or names.is_other_weights(path) for path in paths):
            raise InvalidName(f"there are no weights in {source}: no {names.SAFETENSORS} file")
        yield paths


def _files(source: Path | str | Tensors, scratch: Path) -> dict[str, Path]:
    if isinstance(source, str | Path) and Path(source).is_dir():
        return {path: file for path, file in _walk(Path(source)) if path != names.PUBLISHED}
    file = _one_file(source, scratch / "model.safetensors")
    if file.name in names.RESERVED:
        raise InvalidName(f"{file.name} is a reserved name, not a checkpoint")
    return {file.name: file}


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder by their relative path, without dot-names and unfinished files."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_file() and not names.is_hidden(path) and not names.is_unfinished(path):
            yield check_key(path), file


def _one_file(source: Path | str | Tensors, scratch: Path) -> Path:
    if isinstance(source, Mapping):
        _save(source, scratch)
        return scratch
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file or folder {file}")
    check_key(file.name)
    return file


def _save(tensors: Tensors, path: Path) -> None:
    try:
        if any(hasattr(tensor, "detach") for tensor in tensors.values()):
            import safetensors.torch

            safetensors.torch.save_file(_separate(tensors), path, metadata={"format": "pt"})
        else:
            import numpy as np
            import safetensors.numpy

            arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
            safetensors.numpy.save_file(arrays, path)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "publishing tensors needs safetensors: pip install 'weighbridge[engine]', or publish a file"
        ) from error


def _separate(tensors: Tensors) -> dict[str, Any]:
    """Tensors on the CPU, each with memory of its own: tied weights are written twice, as safetensors wants it."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return separate


def _prove_free(target: Store, folder: str) -> None:
    try:
        target.head(folder + names.PUBLISHED)
    except ObjectNotFound:
        return
    raise _taken(target, folder)


def _taken(target: Store, folder: str) -> AlreadyPublished:
    key = folder + names.PUBLISHED
    return AlreadyPublished(f"{target.url}: {folder} is already published: choose another name", key=key)

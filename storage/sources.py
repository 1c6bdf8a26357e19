"""What is to be published, proven before the first byte is sent: what can only be refused costs no upload, no number.

The rules are those by which it would be judged; a folder is believed to be all there is, since somebody says so.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from weighbridge.storage import arrays, names
from weighbridge.storage.arrays import Tensors
from weighbridge.storage.errors import NotPublishable, StorageError
from weighbridge.storage.index import read_index
from weighbridge.storage.keys import check_key
from weighbridge.storage.protocols import Ref
from weighbridge.storage.safetensors_header import Header, read_header

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


@contextmanager
def gathered(source: Path | str | Tensors, golden: Path | str | Tensors | None) -> Iterator[dict[str, Path]]:
    """The files to send, by their path in the checkpoint; tensors become temporary files.

    Raises NotPublishable (the file, the rule, what to do), FileNotFoundError, InvalidKey, MissingDependency.
    """
    _prove_kind(source)
    if golden is not None:
        _prove_kind(golden)
    with tempfile.TemporaryDirectory(prefix="weighbridge-publish-") as scratch:
        paths = _files(source, Path(scratch))
        said = "these tensors" if isinstance(source, Mapping) else str(source)
        if golden is not None:
            paths[names.GOLDEN] = _one_file(golden, Path(scratch) / names.GOLDEN)
        _prove(paths, said)
        if len(paths) > 1:
            _prove_no_gaps(filter(names.is_weights, paths))
        yield paths


def _prove_kind(source: object) -> None:
    """Raise NotPublishable for what is neither a path nor tensors: a module, a list, nothing."""
    if isinstance(source, Mapping | Path) or (isinstance(source, str) and source):
        return
    if source == "":
        raise NotPublishable("the path is empty: name a file or a folder")
    hint = ": publish its state_dict()" if hasattr(source, "state_dict") else ""
    raise NotPublishable(f"{type(source).__name__} is neither a file, a folder nor tensors by name{hint}")


def _prove(paths: Mapping[str, Path], said: str) -> None:
    """Raise NotPublishable where these files, which people call `said`, can be no checkpoint."""
    weights = sorted(filter(names.is_weights, paths))
    if not weights:
        raise NotPublishable(_no_weights(paths, said))
    headers = {path: _header(paths, path) for path in weights}
    if names.GOLDEN in paths:
        _header(paths, names.GOLDEN)
    _prove_each_once(headers)
    for path in sorted(path for path in paths if path.endswith(names.INDEX)):
        _prove_index(paths, path, headers)


def _no_weights(paths: Mapping[str, Path], said: str) -> str:
    if not paths:
        return f"there are no weights in {said}: it has no files (unfinished and hidden ones are left out)"
    if wrong := next((path for path in sorted(paths) if path.lower().endswith(names.SAFETENSORS)), None):
        return f"there are no weights in {said}: call {wrong} {Path(wrong).stem}{names.SAFETENSORS}"
    if foreign := next(filter(names.is_other_weights, sorted(paths)), None):
        return (
            f"{foreign}: format {names.suffix(foreign)} is not supported yet: publish safetensors "
            "(`safetensors.torch.save_file(model.state_dict(), 'model.safetensors')`)"
        )
    return f"there are no weights in {said}: no {names.SAFETENSORS} file"


def _header(paths: Mapping[str, Path], path: str) -> Header:
    try:
        return read_header(_Local(paths), _ref(paths, path))
    except StorageError as error:
        raise NotPublishable(str(error)) from error


def _prove_each_once(headers: Mapping[str, Header]) -> None:
    holder: dict[str, str] = {}
    for path, header in headers.items():
        for tensor in header.tensors:
            if (other := holder.setdefault(tensor, path)) != path:
                raise NotPublishable(f"tensor {tensor!r} is both in {other} and in {path}: publish one of them")
    if not holder:
        raise NotPublishable(f"there are no tensors in {', '.join(headers)}")


def _prove_index(paths: Mapping[str, Path], path: str, headers: Mapping[str, Header]) -> None:
    """The index names files that are there, and tensors that they hold."""
    try:
        index = read_index(_Local(paths), _ref(paths, path))
    except StorageError as error:
        raise NotPublishable(str(error)) from error
    folder = path.rpartition("/")[0] + "/" * ("/" in path)
    for tensor, shard in index.weight_map.items():
        if folder + shard not in headers:
            raise NotPublishable(f"{path} names {shard}, which is not there")
        if tensor not in headers[folder + shard].tensors:
            raise NotPublishable(f"{path} says that {tensor!r} is in {shard}, which has no such tensor")


def _prove_no_gaps(weights: Iterable[str]) -> None:
    """Of a folder's files that count themselves (`model-00001-of-00003`) every one is there."""
    matches = [match for match in map(_SHARD.fullmatch, weights) if match]
    there = {(match["stem"], int(match["count"]), int(match["number"])) for match in matches}
    for stem, count, _ in sorted(there):
        missing = next((number for number in range(1, count + 1) if (stem, count, number) not in there), None)
        if missing is not None:
            raise NotPublishable(f"{stem}-…-of-{count:05d} has no file number {missing} of {count}")


def _files(source: Path | str | Tensors, scratch: Path) -> dict[str, Path]:
    if isinstance(source, str | Path) and Path(source).is_dir():
        return {path: file for path, file in _walk(Path(source)) if path != names.PUBLISHED}
    file = _one_file(source, scratch / "model.safetensors")
    if file.name in names.RESERVED:
        raise NotPublishable(f"{file.name} is a reserved name, not a checkpoint")
    return {file.name: file}


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder by their relative path, without dot-names and unfinished files."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_file() and not names.is_hidden(path) and not names.is_unfinished(path):
            yield check_key(path), file


def _one_file(source: Path | str | Tensors, scratch: Path) -> Path:
    if isinstance(source, Mapping):
        arrays.save(source, scratch)
        return scratch
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file or folder {file}")
    check_key(file.name)
    return file


def _ref(paths: Mapping[str, Path], path: str) -> Ref:
    return Ref(path, paths[path].stat().st_size, "")


class _Local:
    """The files to send, read as a store's objects are."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        with self._paths[key].open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        return io.BytesIO(self.get(key, start=start, end=end))

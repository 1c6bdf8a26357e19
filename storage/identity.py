"""What makes two checkpoints the same weights: the content of their weight files, and nothing around it.

Pins guard reading; they are not identity. The names of the files and of their folder, their dates and owners, and what
lies beside them (a README, a tokenizer, an index) may all differ. The same tensors cut into other files are other
files, and so are other weights: whoever cuts anew may have changed what is cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime

from weighbridge.storage import names
from weighbridge.storage.errors import PreconditionFailed
from weighbridge.storage.pins import disk_stamp
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.streaming import DigestingReader, Progress, chunks, digest_bytes

_SECOND = 10**9


def weights(files: Iterable[Ref]) -> tuple[Ref, ...]:
    """The files that are the weights: safetensors, or the other formats' where there are none. All else accompanies."""
    refs = tuple(files)
    own = tuple(ref for ref in refs if names.is_weights(ref.key))
    return own or tuple(ref for ref in refs if names.is_other_weights(ref.key))


def digest(contents: Iterable[str]) -> str:
    """One digest for weights, of their files' BLAKE3s: of the sorted list as canonical JSON, so that no name counts."""
    return digest_bytes(json.dumps(sorted(contents), separators=(",", ":")).encode())


def read(store: Get, refs: Iterable[Ref], progress: Progress | None = None) -> str:
    """Digest pinned weights by reading them. Raises PreconditionFailed, ObjectNotFound when they are not those."""
    return digest([_read(store, ref, progress) for ref in refs])


def untouched(before: Ref, after: Ref) -> bool:
    """Whether nobody wrote to the object since it was pinned, told from its pins alone; False: only its bytes tell.

    On disk a new ctime alone is a chmod, a link or a rename. A date in whole seconds was set by somebody (`tar`, `touch
    -d`), often to the same for all files, and proves nothing then: an inode's number is soon used again.
    """
    if before.key != after.key or before.size != after.size:
        return False
    if before.etag == after.etag:
        return True
    old, new = disk_stamp(before.etag), disk_stamp(after.etag)
    return old is not None and old == new and new.modified_ns % _SECOND != 0


def remains(before: Sequence[Ref], after: Sequence[Ref]) -> bool:
    """Whether what is there now is untouched and no more than what was: a part may be gone, nothing was written."""
    known = {ref.key: ref for ref in before}
    return all(ref.key in known and untouched(known[ref.key], ref) for ref in after)


def same_files(before: Sequence[Ref], after: Sequence[Ref]) -> bool:
    """Whether these are the same files on disk, as long as they were: touched, or written in place."""
    return len(before) == len(after) and all(map(_same_file, *(sorted(refs, key=_key) for refs in (before, after))))


def written_at(refs: Iterable[Ref]) -> float | None:
    """When the newest of these files was written by the store's clock, in seconds since the epoch; None: unknown."""
    return max((datetime.fromisoformat(ref.modified).timestamp() for ref in refs if ref.modified), default=None)


def _key(ref: Ref) -> str:
    return ref.key


def _same_file(before: Ref, after: Ref) -> bool:
    old, new = disk_stamp(before.etag), disk_stamp(after.etag)
    return before.key == after.key and old is not None and new is not None and old[:2] == new[:2]


def _read(store: Get, ref: Ref, progress: Progress | None) -> str:
    with store.open(ref.key, if_match=ref) as stream:
        reader = DigestingReader(stream, size=ref.size, progress=progress)
        for _ in chunks(reader):  # type: ignore[arg-type]
            pass
    if reader.size != ref.size:
        raise PreconditionFailed(f"{ref.key} has {reader.size:,} bytes, not {ref.size:,}", key=ref.key)
    return reader.digest

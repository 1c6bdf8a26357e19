"""Which version a checkpoint's weights are: the same weights are the same version, wherever and however often they lie.

`compare` is pure and says what a look at a path means. A version claims its weights when it was judged; later ones with
the same are duplicates of it. Every verb takes an open transaction.

Locks: the checkpoint's row, then the version's, then the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlmodel import col

from weighbridge.registry import events
from weighbridge.registry.db import Session
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.registry.models import Checkpoint, CheckpointFile, Model, Version
from weighbridge.storage import identity
from weighbridge.storage.protocols import Ref

_JUDGED_WHOLE = (VersionStatus.READY, VersionStatus.ARCHIVED, VersionStatus.DUPLICATE)
"""Nobody reads their files again: what accompanied them stays as it was then."""
_UNREAD = (VersionStatus.DISCOVERED, VersionStatus.SUPERSEDED)
"""Nobody has told yet what they hold: whatever lies there now is what they are of."""


class Change(Enum):
    """What lies at a path now, against the version that came from there last."""

    SAME = auto()
    """The same weights, or files that nobody has read yet: nothing is made, whatever else changed."""
    LESS = auto()
    """A part of them is gone, and nothing was written."""
    UNKNOWN = auto()
    """They were written anew; only their bytes tell whether they are others."""
    NEW = auto()
    """Other weights, or the first at this path."""


@dataclass(frozen=True, slots=True)
class Known:
    """The version that came from a path last, with the files that it pins."""

    version: Version
    files: tuple[Ref, ...]

    @property
    def digest(self) -> str | None:
        """Of its weights; None while nobody has read them."""
        return self.version.weights or self.version.facts.get("weights")


def current(tx: Session, model: str, path: str, *, lock: bool = False) -> Known | None:
    """The version that came from this path last, if there is one."""
    mine = select(Version).join(Checkpoint, col(Checkpoint.id) == col(Version.checkpoint_id))
    mine = mine.where(col(Checkpoint.model) == model, col(Checkpoint.path) == path).order_by(col(Version.id).desc())
    if lock:
        mine = mine.with_for_update(of=Version, key_share=True)
    version = tx.scalars(mine.limit(1), execution_options={"populate_existing": True}).one_or_none()
    if version is None:
        return None
    pinned = (
        select(CheckpointFile).where(col(CheckpointFile.version_id) == version.id).order_by(col(CheckpointFile.key))
    )
    return Known(version, tuple(_ref(file) for file in tx.scalars(pinned)))


def compare(known: Known | None, found: Sequence[Ref], digest: str | None) -> Change:
    """Say what the weights `found` at a path are; `digest` is theirs where somebody read them. Pure.

    Bytes are needed only where the pins do not tell and the sizes are the same.
    """
    if known is None:
        return Change.NEW
    before = identity.weights(known.files)
    if identity.remains(before, found):
        return Change.SAME if len(found) == len(before) else Change.LESS
    if known.digest is None and known.version.status in _UNREAD and identity.same_files(before, found):
        return Change.SAME  # whatever it holds, the version is of what lies there: nobody has read another
    if known.digest is None or sorted(ref.size for ref in before) != sorted(ref.size for ref in found):
        return Change.NEW
    if digest is None:
        return Change.UNKNOWN
    return Change.SAME if digest == known.digest else Change.NEW


def is_less(known: Known | None, found: Sequence[Ref]) -> bool:
    """Whether a path that is no whole checkpoint now is only what was left of the version that came from there."""
    if known is None or known.version.status == VersionStatus.SUPERSEDED:
        return False
    return compare(known, found, None) in (Change.SAME, Change.LESS)


def accompany(tx: Session, known: Known, found: Sequence[Ref], model: str, *, actor: str) -> bool:
    """The same weights with other pins, or in other company: note it, and let whoever reads them again find them.

    Returns whether a judgement under way has to start over, since it reads what is no longer there.
    """
    version = known.version
    before, after = {ref.key: ref for ref in known.files}, {ref.key: ref for ref in found}
    own = {ref.key for ref in identity.weights(found)}
    told = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(
            key for key in before.keys() & after.keys() - own if not identity.untouched(before[key], after[key])
        ),
    }
    stale = any(after.get(key) is None or after[key].etag != ref.etag for key, ref in before.items())
    if version.status in _JUDGED_WHOLE:
        _pin(tx, version, [after.get(key, ref) for key, ref in before.items()])
    elif stale or (told["added"] and version.status != VersionStatus.DISCOVERED):
        _pin(tx, version, found)
    if known.digest is None:
        version.written_at = identity.written_at(identity.weights(found)) or version.written_at
    if any(told.values()):
        after_all = {"path": version.path, **told}
        _tell(tx, "companions", version, model, after=after_all, actor=actor, reason=_advice(version, model))
    return stale and version.status in (VersionStatus.DISCOVERED, VersionStatus.SUPERSEDED)


def claim(tx: Session, version: Version, digest: str) -> str | None:
    """The locked version's weights were read: they are its own from now on. None, or why it is a duplicate.

    Of two that are judged at once the first to end has them: never are both ready.
    """
    model = tx.get_one(Model, version.model_id, with_for_update={"key_share": True}, populate_existing=True)
    owner = having(tx, version.model_id, digest)
    if owner is None or owner.id == version.id:
        version.weights = digest
        tx.flush()
        return None
    if version.number < owner.number:
        owner.written_at = min(owner.written_at, version.written_at)  # it was only judged sooner
    return duplicate(tx, version, owner, model.name)


def duplicate(tx: Session, version: Version, owner: Version, model: str) -> str:
    """Note that the version has another one's weights; return what it says of itself, and what a person may do."""
    version.duplicate_of = owner.number
    tx.flush()
    advice = {
        VersionStatus.READY: f"`weighbridge rollback {model} {owner.number}` serves that version again",
        VersionStatus.ARCHIVED: "it stays archived",
    }.get(VersionStatus(owner.status), f"`weighbridge rejudge {model} {owner.number}` judges that version anew")
    return f"the same weights as version {owner.number}, which is {owner.status}: {advice}"


def inherit(tx: Session, lost: Version) -> Version | None:
    """The bytes of a version are lost: its newest duplicate has them still, and is the version of its weights now."""
    mine = select(Version).where(col(Version.model_id) == lost.model_id, col(Version.duplicate_of) == lost.number)
    found = tx.scalars(mine.order_by(col(Version.number).desc()).with_for_update(key_share=True)).all()
    for version in found:
        version.duplicate_of = found[0].number if version is not found[0] else None
    tx.flush()
    return next(iter(found), None)


def having(tx: Session, model_id: int, digest: str) -> Version | None:
    """The version of the model that these weights are."""
    return tx.scalars(
        select(Version).where(col(Version.model_id) == model_id, col(Version.weights) == digest)
    ).one_or_none()


def newest_first() -> tuple[Any, Any]:
    """By when versions' weights were written, the newest first; by number where the store's clock is coarse."""
    return col(Version.written_at).desc(), col(Version.number).desc()


def newest(*admitted: Any) -> Any:
    """A subquery (id, model_id, number): of each model the version written last, of those that the conditions admit."""
    rank = func.row_number().over(partition_by=col(Version.model_id), order_by=newest_first()).label("rank")
    ranked = select(col(Version.id), col(Version.model_id), col(Version.number), rank).where(*admitted).subquery()
    return select(ranked.c.id, ranked.c.model_id, ranked.c.number).where(ranked.c.rank == 1).subquery()


def _advice(version: Version, model: str) -> str:
    if version.status in (VersionStatus.REJECTED, VersionStatus.QUARANTINED, VersionStatus.NEEDS_BINDING):
        return f"the weights are the same: `weighbridge rejudge {model} {version.number}` judges them anew"
    return "the weights are the same"


def _pin(tx: Session, version: Version, refs: Sequence[Ref]) -> None:
    """Replace the version's pins; a digest stays with a file whose content did."""
    mine = col(CheckpointFile.version_id) == version.id
    rows = {row.key: row for row in tx.scalars(select(CheckpointFile).where(mine))}
    own = {ref.key for ref in identity.weights(refs)}
    gone = rows.keys() - {ref.key for ref in refs}
    if gone:
        tx.execute(delete(CheckpointFile).where(mine, col(CheckpointFile.key).in_(gone)))
    for ref in refs:
        row = rows.get(ref.key)
        if row is None:
            add_files(tx, version, [ref])
        elif _ref(row) != ref:
            kept = row.digest if ref.key in own or identity.untouched(_ref(row), ref) else None
            for name, value in _pins(ref).items():
                setattr(row, name, value)
            row.digest = kept
    tx.flush()


def add_files(tx: Session, version: Version, refs: Sequence[Ref]) -> None:
    """Insert the pins of a version."""
    if refs:
        tx.execute(insert(CheckpointFile), [{"version_id": version.id, "key": ref.key, **_pins(ref)} for ref in refs])


def _pins(ref: Ref) -> dict[str, Any]:
    return {"size": ref.size, "etag": ref.etag, "object_version": ref.version_id, "modified": ref.modified}


def _ref(file: CheckpointFile) -> Ref:
    return Ref(file.key, file.size, file.etag, file.object_version, file.modified)


def _tell(
    tx: Session, what: str, version: Version, model: str, *, after: Mapping[str, Any], actor: str, reason: str
) -> None:
    subject = f"version:{version.id}"
    events.record(
        tx, f"version.{what}", model=model, version=version.number, subject=subject, after=after, actor=actor,
        reason=reason,
    )  # fmt: skip

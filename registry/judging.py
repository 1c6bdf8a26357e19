"""By what versions are judged: pinned when they are recorded, and anew when they are judged again.

The registry reads no bucket. So a version that is judged again has no pins until a worker, who can read it, has looked
(`pin`); and the daemon, who watches it, hands in what lies there (`supply`). `need` is pure and says whom it concerns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum, auto
from typing import Any

from sqlalchemy import and_, func, select
from sqlmodel import col

from weighbridge.registry import events, jobs, recipes, variants, versions
from weighbridge.registry.clock import now
from weighbridge.registry.db import Session
from weighbridge.registry.lifecycle import JobState, Stage, VariantStatus, VersionStatus
from weighbridge.registry.models import Job, Model, Recipe, Version
from weighbridge.registry.recipe import Policy, revision_digest
from weighbridge.storage.protocols import Ref

AT_ONCE = 4
"""Versions of one model that are judged again by themselves at the same time: new ones need not wait for hundreds."""
_TRIES = 3
_OPEN = (VersionStatus.DISCOVERED, VersionStatus.READY, VersionStatus.REJECTED, VersionStatus.NEEDS_BINDING)


@dataclass(frozen=True, slots=True)
class Judges:
    """What lies beside a model's checkpoints: the recipe's text (None: there is none) and the pins of both sets."""

    recipe_text: str | None = None
    evaluation: Ref | None = None
    training: Ref | None = None

    def revision(self, policy: Policy) -> str:
        """The digest of the recipe's revision under the policy."""
        return revision_digest(self.recipe_text, policy)


@dataclass(frozen=True, slots=True)
class Judged:
    """A version, and what judged it. `recipe` is a revision's digest, None: nothing is pinned yet."""

    status: VersionStatus
    recipe: str | None
    evaluation: Mapping[str, Any] | None
    evaluated: bool | None
    """Whether its quality was measured; None: nobody tried."""
    path: str = ""
    """The checkpoint's."""


class Need(Enum):
    """What other judges mean for a version."""

    NOTHING = auto()
    ANEW = auto()
    """Judge it from the beginning: it lacked what is there now."""
    EVALUATION = auto()
    """Measure its quality; it stays ready, and serves, unless the verdict says otherwise."""
    LATER = auto()
    """It is being judged by what was there before: ask again when that has ended."""


def need(seen: Judged, there: Judges, policy: Policy) -> Need:
    """Whether a version lacked what lies there now: a program, or what its quality is measured by. Pure.

    A verdict that was reached stays: other wishes judge later versions, and this one when a person says `rejudge`.
    """
    if seen.recipe is None:
        return Need.NOTHING  # whoever judges it looks then
    other_recipe = seen.recipe != there.revision(policy)
    unmeasured = seen.evaluated is False or seen.evaluation is None
    other_set = unmeasured and there.evaluation is not None and seen.evaluation != asdict(there.evaluation)
    match seen.status:
        case VersionStatus.NEEDS_BINDING if other_recipe:
            return Need.ANEW
        case VersionStatus.REJECTED if other_set or (other_recipe and seen.evaluated is False):
            return Need.ANEW
        case VersionStatus.READY if other_set:
            return Need.EVALUATION
        case VersionStatus.DISCOVERED if other_set or other_recipe:
            return Need.LATER
    return Need.NOTHING


def pin(tx: Session, version_id: int, judgement: int, there: Judges, policy: Policy) -> None:
    """Pin what lies there for this judgement, unless that is done or another one has begun. Raises NotFound."""
    version = versions.lock(tx, version_id)
    if version.recipe_id is not None or version.judgement != judgement:
        return
    model = tx.get_one(Model, version.model_id)
    version.recipe_id = recipes.pin(tx, model.name, there.recipe_text, policy).id
    version.eval_pin, version.train_pin = _plain(there.evaluation), _plain(there.training)
    version.revision += 1
    tx.flush()


def lacking(tx: Session, model: str) -> dict[int, Judged]:
    """The versions of a model, newest first by their ids, whose verdict was not reached, or not by their quality."""
    statement = (
        select(Version, col(Recipe.digest))
        .join(Model, col(Model.id) == col(Version.model_id))
        .join(Recipe, col(Recipe.id) == col(Version.recipe_id))
        .where(col(Model.name) == model, col(Version.status).in_(_OPEN))
        .order_by(col(Version.id).desc())
    )
    found = {row.id or 0: _judged(row, digest) for row, digest in tx.execute(statement)}
    measured = (VersionStatus.READY, VersionStatus.REJECTED)
    return {
        version_id: seen
        for version_id, seen in found.items()
        if seen.status not in measured or seen.evaluated is False or seen.evaluation is None
    }


def room(tx: Session, model: str) -> int:
    """How many more versions of a model may be judged again now."""
    busy = and_(col(Job.state) == JobState.QUEUED, col(Job.not_before) <= now()) | (col(Job.state) == JobState.RUNNING)
    mine = select(func.count()).select_from(Job).join(Version, col(Version.id) == col(Job.subject_id))
    mine = mine.join(Model, col(Model.id) == col(Version.model_id)).where(col(Model.name) == model, busy)
    return max(0, AT_ONCE - tx.execute(mine.where(col(Job.subject_type) == "version")).scalar_one())


def supply(tx: Session, version_id: int, there: Judges, policy: Policy, *, actor: str) -> Need:
    """Judge a version again by what it lacked, if it still lacks it; return what was done. Raises NotFound."""
    version = versions.lock(tx, version_id)
    pinned = versions.judged_by(tx, version)
    seen = _judged(version, pinned.digest if pinned else None)
    wanted = need(seen, there, policy)
    model = tx.get_one(Model, version.model_id)
    if wanted is Need.ANEW:
        what = "recipe or policy" if seen.recipe != there.revision(policy) else "evaluation set"
        versions.reopen(tx, version, model.name, actor=actor, reason=f"there is another {what} now")
    elif wanted is Need.EVALUATION and there.evaluation is not None:
        return _evaluate(tx, version, model.name, asdict(there.evaluation), actor=actor)
    return wanted


def models_without_program(tx: Session) -> list[str]:
    """The models that have versions which no program was found for: another policy may allow one."""
    named = select(col(Model.name)).join(Version, col(Version.model_id) == col(Model.id))
    return list(tx.scalars(named.where(col(Version.status) == VersionStatus.NEEDS_BINDING).distinct()))


def wake(tx: Session, model: str) -> int:
    """What judges a model changed: let the judgements that wait for it look now; return how many."""
    waiting = select(col(Version.id)).join(Model, col(Model.id) == col(Version.model_id))
    waiting = waiting.where(col(Model.name) == model, col(Version.status) == VersionStatus.DISCOVERED)
    found = tx.scalars(waiting.where(col(Version.recipe_id).is_(None))).all()
    return sum(jobs.wake(tx, "version", version_id) for version_id in found if version_id is not None)


def _evaluate(tx: Session, version: Version, model: str, evaluation: dict[str, Any], *, actor: str) -> Need:
    """Run the evaluation of the present judgement again, with the set; of its variants that are served too."""
    assert version.id is not None
    mine = jobs.of(tx, "version", version.id)
    ended = [job for job in mine if job.key == versions.key(version, Stage.EVALUATE) and job.state == JobState.DONE]
    if not ended:
        return Need.LATER
    version.eval_pin = evaluation
    version.revision += 1
    tx.flush()
    built = variants.evaluations(tx, version, VariantStatus.READY)
    for job in (*ended, *built):
        jobs.again(tx, job.id or 0, _TRIES)
    reason = "an evaluation set is there now; it serves on until that has a verdict"
    subject = f"version:{version.id}"
    events.record(
        tx, "version.evaluated_again", model=model, version=version.number, subject=subject, actor=actor, reason=reason
    )
    return Need.EVALUATION


def _judged(version: Version, recipe: str | None) -> Judged:
    return Judged(
        VersionStatus(version.status), recipe, version.eval_pin, version.evidence.get("evaluated"), version.path
    )


def _plain(ref: Ref | None) -> dict[str, Any] | None:
    return None if ref is None else asdict(ref)

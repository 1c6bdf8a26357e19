"""Judged again by what was lacking, on both databases: once, a few at a time, and under the version's lock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures.registry import record, work
from sqlmodel import col, select

from weighbridge.registry import artifacts, champion, judging, versions
from weighbridge.registry.db import Database, Session
from weighbridge.registry.judging import AT_ONCE, Judges, Need
from weighbridge.registry.lifecycle import Verdict
from weighbridge.registry.models import Event, Job, Version
from weighbridge.registry.recipe import NO_POLICY
from weighbridge.storage.protocols import Ref

THERE = Judges("program: {template: a}", Ref("digits/eval.safetensors", 8, "one"))


def judged(database: Database, name: str, verdict: Verdict, status: str) -> int:
    """A version that ended like this without a set; its id."""
    with database.transaction() as tx:
        made = record(tx, name)
        assert made.version.id is not None
        artifacts.store_artifact(tx, made.version.id, artifact_digest=name * 64, blobs={})
        made.version.evidence = {"evaluated": False}
        first = verdict if verdict is Verdict.NEEDS_BINDING else Verdict.PASSED
        for following in work(tx, made.jobs[0].id, first):
            work(tx, following, verdict)
        assert made.version.status == status
        return made.version.id


def supply(database: Database, version_id: int) -> Need:
    with database.transaction() as tx:
        return judging.supply(tx, version_id, THERE, NO_POLICY, actor="judging")


def keys(tx: Session, version_id: int) -> list[str]:
    mine = select(col(Job.key)).where(col(Job.subject_type) == "version", col(Job.subject_id) == version_id)
    return list(tx.scalars(mine.order_by(col(Job.id))))


@pytest.mark.parametrize(
    ("verdict", "status"), [(Verdict.NEEDS_BINDING, "needs_binding"), (Verdict.REJECTED, "rejected")]
)
def test_of_several_daemons_one_begins_the_new_judgement(database: Database, verdict: Verdict, status: str) -> None:
    """Four at once, and one afterwards: one judgement, one job, one event, with the reason."""
    version_id = judged(database, "a", verdict, status)
    with ThreadPoolExecutor(4) as daemons:
        done = list(daemons.map(lambda _: supply(database, version_id), range(4)))
    assert sorted(one.name for one in done) == ["ANEW", "NOTHING", "NOTHING", "NOTHING"]
    assert supply(database, version_id) is Need.NOTHING
    with database.read() as tx:
        version = tx.get_one(Version, version_id)
        assert (version.status, version.judgement, version.recipe_id) == ("discovered", 2, None)
        assert keys(tx, version_id)[-1] == f"version:{version_id}:validate:2"
        told = tx.scalars(select(Event).where(Event.kind == "version.discovered")).all()
        assert [(event.actor, event.reason) for event in told] == [("judging", "there is another recipe or policy now")]


def test_what_is_ready_is_evaluated_again_where_it_stands(database: Database) -> None:
    """Its job runs once more; it stays ready meanwhile, and its new verdict decides."""
    version_id = judged(database, "a", Verdict.NOT_APPLICABLE, "ready")
    assert supply(database, version_id) is Need.EVALUATION
    with database.transaction() as tx:
        version = tx.get_one(Version, version_id)
        assert (version.status, version.judgement, (version.eval_pin or {})["etag"]) == ("ready", 1, "one")
        evaluate = tx.scalars(select(Job).where(Job.stage == "evaluate")).one()
        assert (evaluate.state, evaluate.verdict) == ("queued", None)
        versions.advance(tx, version_id, actor="reconcile", policies=())
        assert champion.slot(tx, version.model_id, 1) is not None
        work(tx, evaluate.id, Verdict.REJECTED, "accuracy 0.1 < 0.9 (min)")
        assert (version.status, version.reason) == ("rejected", "accuracy 0.1 < 0.9 (min)")


def test_an_evaluation_under_way_is_not_taken_from_its_worker(database: Database) -> None:
    """It is looked at again when that has ended."""
    with database.transaction() as tx:
        made = record(tx, "a", recipe_text="lane: fast")
        artifacts.store_artifact(tx, 1, artifact_digest="a" * 64, blobs={})
        (evaluate,) = work(tx, made.jobs[0].id)
    assert supply(database, 1) is Need.LATER
    with database.transaction() as tx:
        work(tx, evaluate, Verdict.NOT_APPLICABLE, "there is no eval.safetensors")
    assert supply(database, 1) is Need.EVALUATION


def test_a_few_at_a_time_the_newest_first(database: Database) -> None:
    """Hundreds that lacked something hold up no new checkpoint; another model's are not counted."""
    ids = [judged(database, name, Verdict.NEEDS_BINDING, "needs_binding") for name in "abcdef"]
    with database.read() as tx:
        assert list(judging.lacking(tx, "digits")) == ids[::-1]
        assert (judging.room(tx, "digits"), judging.lacking(tx, "other")) == (AT_ONCE, {})
    for version_id in ids[:3]:
        supply(database, version_id)
    with database.transaction() as tx:
        assert judging.room(tx, "digits") == AT_ONCE - 3
        record(tx, "z", model="other")
        assert judging.room(tx, "other") == AT_ONCE - 1

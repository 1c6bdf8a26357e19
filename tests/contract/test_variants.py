"""Variants on both databases: opened with their version, moved by their jobs, each for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fixtures.registry import record, work
from sqlalchemy import update
from sqlmodel import col, select

from weighbridge.registry import (
    aliases,
    archiving,
    artifacts,
    jobs,
    judging,
    rollouts,
    variants,
    versions,
    workers_seen,
)
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import FencedOut, NotFound
from weighbridge.registry.judging import Judges
from weighbridge.registry.lifecycle import JobState, Stage, Verdict, kind_queue
from weighbridge.registry.models import Event, Host, Job, Variant, Version
from weighbridge.registry.recipe import NO_POLICY
from weighbridge.registry.schemas import VariantTensor

TWO = "variants: [bf16, int8-dynamic]\n"
CPU, CUDA = "c" * 16, "d" * 16
PASSED = Verdict.PASSED


def ready(database: Database, recipe: str | None = TWO, name: str = "a", files: Sequence[str] = ()) -> int:
    """Record a version of the model `digits` and take it to ready; return its id."""
    with database.transaction() as tx:
        recorded = record(tx, name, recipe_text=recipe)
        recorded.version.facts = {"files": [{"path": path} for path in files]}
        version_id = recorded.version.id
        assert version_id is not None
        artifacts.store_artifact(tx, version_id, artifact_digest=name * 64, blobs={})
        (evaluate,) = work(tx, recorded.jobs[0].id)
    with database.transaction() as tx:
        work(tx, evaluate)
    return version_id


def worker(database: Database, kind: str = CPU, *, device: str = "cpu", queues: Sequence[str] = ("variants",)) -> None:
    with database.transaction() as tx:
        hardware = {"kind": kind, "device": device, "memory_bytes": 1 << 30, "label": f"the {device}"}
        workers_seen.seen(tx, f"worker-{kind}", machine="m", queues=queues, kind=kind, hardware=hardware)


def do(tx: Session, job_id: int | None, verdict: Verdict = PASSED, reason: str = "fine") -> list[Job]:
    """Do a variant's job in one transaction, as a worker ends one; return the jobs that follow."""
    assert job_id is not None
    claim = jobs.claim(tx, job_id, "worker", 30)
    assert claim is not None
    variants.lock(tx, claim.subject_id)
    jobs.finish(tx, claim, verdict, reason, {})
    return variants.advance(tx, claim.subject_id, actor="worker")


def todo(database: Database) -> list[Job]:
    """The variants' jobs that are queued, oldest first."""
    with database.read() as tx:
        mine = select(Job).where(Job.subject_type == "variant", Job.state == JobState.QUEUED)
        return list(tx.scalars(mine.order_by(col(Job.id))))


def finish_all(database: Database, verdicts: dict[tuple[str, Stage], Verdict] | None = None) -> None:
    """Do every job of every variant until none is left; all pass but those that are named."""
    while waiting := todo(database):
        with database.transaction() as tx:
            job = waiting[0]
            name = tx.get_one(Variant, job.subject_id).name
            do(tx, job.id, (verdicts or {}).get((name, Stage(job.stage)), PASSED), f"{job.stage} of {name}")


def statuses(database: Database, version_id: int) -> dict[str, str]:
    with database.read() as tx:
        return {row.name: row.status for row in variants.listing(tx, version_id)}


def keys(found: Sequence[Job]) -> list[str]:
    return [job.key for job in found]


def test_variants_are_opened_when_their_version_is_ready(database: Database) -> None:
    """Not before; the version does not wait for them, and their jobs go beside the ones of new checkpoints."""
    with database.transaction() as tx:
        recorded = record(tx, "a", recipe_text=TWO)
        assert variants.listing(tx, 1) == []
        artifacts.store_artifact(tx, 1, artifact_digest="a" * 64, blobs={})
        (evaluate,) = work(tx, recorded.jobs[0].id)
        assert statuses_of(tx) == {"original": "pending"}
        opened = [tx.get_one(Job, job_id) for job_id in work(tx, evaluate)]
        assert keys(opened) == ["variant:2:compress::1", "variant:3:compress::1"]
        assert {(job.queue, job.stage, job.part, str(job.needs)) for job in opened} == {
            ("variants", "compress", "", "{}")
        }
        assert statuses_of(tx) == {"original": "ready", "bf16": "pending", "int8-dynamic": "pending"}
        assert tx.get_one(Version, 1).status == "ready"
        assert variants.get(tx, 1, "bf16").wish["method"] == "bf16"
        assert not variants.settled(tx, 1)
        with pytest.raises(NotFound, match="no variant fp16 of version 1: did you mean bf16"):
            variants.get(tx, 1, "fp16")


def statuses_of(tx: Session) -> dict[str, str]:
    return {row.name: row.status for row in variants.listing(tx, 1)}


def test_each_variant_ends_for_itself(database: Database) -> None:
    """One cannot be built, one breaks, one misses its quality, one passes; the version and the others go on."""
    version_id = ready(database, "variants: [bf16, fp16, onnx, int8-dynamic]")
    verdicts = {
        ("bf16", Stage.COMPRESS): Verdict.NOT_APPLICABLE,
        ("fp16", Stage.COMPRESS): Verdict.REJECTED,
        ("onnx", Stage.EVALUATE): Verdict.REJECTED,
    }
    finish_all(database, verdicts)
    assert statuses(database, version_id) == {
        "original": "ready",
        "bf16": "not_applicable",
        "fp16": "failed",
        "onnx": "rejected",
        "int8-dynamic": "ready",
    }
    with database.read() as tx:
        assert tx.get_one(Version, version_id).status == "ready"
        assert variants.settled(tx, version_id)
        assert variants.overdue(tx) == []
        told = tx.execute(
            select(Event.kind, Event.subject, Event.reason, Event.after).where(col(Event.kind).startswith("variant."))
        )
        said = {(kind, subject, reason, after["name"]) for kind, subject, reason, after in told}
    assert said == {
        ("variant.not_applicable", "variant:2", "compress of bf16", "bf16"),
        ("variant.failed", "variant:3", "compress of fp16", "fp16"),
        ("variant.rejected", "variant:4", "evaluate of onnx", "onnx"),
        ("variant.ready", "variant:5", "evaluate of int8-dynamic", "int8-dynamic"),
    }


def test_a_checkpoint_of_several_files_is_compressed_side_by_side(database: Database) -> None:
    """A job a file where the method streams, then one that joins them; other methods build the whole."""
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"]
    ready(database, "variants: [int8-rows, bf16]", files=files)
    assert keys(todo(database)) == ["variant:2:compress:0:1", "variant:2:compress:1:1", "variant:3:compress::1"]
    with database.transaction() as tx:
        first, second, _ = todo(database)
        assert do(tx, first.id) == []
        (joined,) = do(tx, second.id)
        (compared,) = do(tx, joined.id)
    assert (joined.key, compared.key) == ("variant:2:assemble::1", "variant:2:evaluate::1")
    assert (joined.queue, compared.queue) == ("variants", "variants")


def test_the_last_two_shards_ending_together_are_joined_once(
    database: Database, open_again: Callable[[], Database]
) -> None:
    """Neither sees the other open: the row's lock lets the second see what the first did."""
    ready(database, "variants: [int4-groups]", files=[f"{number}.safetensors" for number in range(6)])
    start, processes, waiting = threading.Barrier(6), [open_again() for _ in range(3)], todo(database)

    def end(number: int) -> list[Job]:
        start.wait(10)
        with processes[number % 3].transaction() as tx:
            return do(tx, waiting[number].id)

    with ThreadPoolExecutor(6) as pool:
        new = [job for found in pool.map(end, range(6)) for job in found]
    assert keys(new) == ["variant:2:assemble::1"]


def test_ready_variants_are_measured_where_a_worker_is(database: Database) -> None:
    """The original too, each on the queue of the kind; a kind that no host has is left out while another one fits.

    Nothing is measured while something is still built: that would spoil it.
    """
    worker(database)
    worker(database, CUDA, device="cuda", queues=["gpu"])
    version_id = ready(database, "variants: [bf16]")
    assert [job.stage for job in todo(database)] == [Stage.COMPRESS]
    finish_all(database, {("bf16", Stage.BENCHMARK): Verdict.NOISY})
    with database.read() as tx:
        measured = variants.jobs_of(tx, version_id)["original"]
    assert [(job.key, job.queue, job.needs) for job in measured] == [
        (f"variant:1:benchmark:{kind}:1", kind_queue(kind), {"kind": kind}) for kind in (CPU, CUDA)
    ]
    assert statuses(database, version_id) == {"original": "ready", "bf16": "ready"}
    with database.transaction() as tx:
        assert len(variants.jobs_of(tx, version_id)["bf16"]) == 4
        tx.add(Host(id="h", device={"kind": CPU}))
    other = ready(database, "{variants: [bf16], benchmark: true}", "b")
    ready(database, "{variants: [bf16], benchmark: false}", "c")
    finish_all(database)
    with database.read() as tx:
        found = variants.jobs_of(tx, other)["original"]
        assert [job.part for job in found] == [CPU]
        assert "original" not in variants.jobs_of(tx, other + 1)


@pytest.mark.parametrize(("live", "queue", "needs"), [(True, "gpu", {"device": "cuda"}), (False, "variants", {})])
def test_what_needs_cuda_goes_there(database: Database, live: bool, queue: str, needs: dict[str, Any]) -> None:
    """Where a live worker has it; else to any worker, which says that the variant is not applicable."""
    worker(database)
    if live:
        worker(database, CUDA, device="cuda", queues=["gpu"])
    ready(database, "{variants: [sparse-2-4], benchmark: false}")
    (job,) = todo(database)
    assert (job.queue, {name: need for name, need in job.needs.items() if name != "memory"}) == (queue, needs)
    with database.transaction() as tx:
        (compared,) = do(tx, job.id)
    assert (compared.queue, compared.needs) == (queue, job.needs)


def test_memory_is_asked_for_where_some_worker_has_it(database: Database) -> None:
    """What reads the whole checkpoint goes to a worker that it fits into; what streams goes anywhere."""
    worker(database)
    ready(database, "{variants: [bf16, int8-rows], benchmark: false}")
    assert [job.needs for job in todo(database)] == [{"memory": 3 * 64}, {}]


def test_a_version_that_leaves_ready_stops_its_variants(database: Database) -> None:
    """Queued jobs are cancelled, and the one that runs is fenced out; nothing follows afterwards."""
    version_id = ready(database)
    running, _ = todo(database)
    with database.transaction() as tx:
        claim = jobs.claim(tx, running.id or 0, "worker", 30)
        assert claim is not None
        archiving.archive(tx, "digits", 1, actor="ann", reason="wrong data")
    assert todo(database) == []
    with database.transaction() as tx, pytest.raises(FencedOut):
        jobs.finish(tx, claim, PASSED, "late", {})
    with database.transaction() as tx:
        assert variants.advance(tx, 2, actor="late") == []
        assert variants.overdue(tx) == []
    assert statuses(database, version_id)["bf16"] == "pending"


def test_a_new_judgement_builds_anew(database: Database) -> None:
    """By the recipe of now: what was built is forgotten, what is no longer asked for is not applicable."""
    with database.transaction() as tx:
        recorded = record(tx, "a", recipe_text="lane: fast\n" + TWO)
        artifacts.store_artifact(tx, 1, artifact_digest="a" * 64, blobs={})
        evaluate, first, _ = work(tx, recorded.jobs[0].id)
        (compared,) = do(tx, first)
        artifacts.store_artifact(tx, 1, "bf16", artifact_digest="b" * 64, blobs={}, size=32)
        do(tx, compared.id)
        assert statuses_of(tx) == {"original": "ready", "bf16": "ready", "int8-dynamic": "pending"}
        work(tx, evaluate, Verdict.REJECTED, "accuracy 0.2 < 0.9")
    assert todo(database) == []
    with database.transaction() as tx:
        (validate,) = versions.rejudge(tx, "digits", 1, actor="ann", reason="new data")
        judging.pin(tx, 1, 2, Judges("variants: [{method: bf16, skip: [head]}, fp16]"), NO_POLICY)
        artifacts.store_artifact(tx, 1, artifact_digest="a" * 64, blobs={})
        (evaluate,) = work(tx, validate.id)
        opened = [tx.get_one(Job, job_id).key for job_id in work(tx, evaluate)]
        bf16, fp16, dropped = (variants.get(tx, 1, name) for name in ("bf16", "fp16", "int8-dynamic"))
        assert opened == [f"variant:{bf16.id}:compress::2", f"variant:{fp16.id}:compress::2"]
        assert (bf16.status, bf16.artifact_digest, bf16.size, bf16.wish["skip"]) == ("pending", None, 0, ["head"])
        assert dropped.status == "not_applicable"
        assert "does not ask for it" in dropped.reason


def test_what_nobody_moves_is_overdue(database: Database) -> None:
    """A job whose attempts are used up fails its variant at the next look."""
    version_id = ready(database, "variants: [bf16]")
    (job,) = todo(database)
    with database.transaction() as tx:
        assert variants.overdue(tx) == []
        tx.execute(update(Job).where(col(Job.id) == job.id).values(state="failed", reason="the worker died"))
        assert variants.overdue(tx) == [2]
        assert variants.advance(tx, 2, actor="reconcile") == []
        assert variants.overdue(tx) == []
        assert variants.settled(tx, version_id)
        failed = variants.get(tx, version_id, "bf16")
    assert (failed.status, failed.reason) == ("failed", "compress did not finish: the worker died")


def test_a_new_kind_of_worker_measures_what_may_be_served(database: Database) -> None:
    """The newest ready version and those with an alias; older ones and recipes that ask for no figures are left."""
    old, named = ready(database, "variants: [bf16]", "a"), ready(database, "benchmark: true", "b")
    newest = ready(database, "variants: [bf16]", "c")
    finish_all(database)
    with database.transaction() as tx:
        aliases.set_alias(tx, "digits", "blue", 2, actor="ann")
        assert variants.overdue(tx) == []
    worker(database)
    with database.transaction() as tx:
        due = variants.overdue(tx)
        assert {tx.get_one(Variant, variant_id).version_id for variant_id in due} == {named, newest}
        assert len(due) == 3
        queued = [job for variant_id in due for job in variants.advance(tx, variant_id, actor="reconcile")]
        assert {job.subject_id for job in queued} == set(due)
        assert {job.part for job in queued} == {CPU}
        assert variants.overdue(tx) == []
        assert variants.settled(tx, old)
        assert not variants.settled(tx, newest)
        workers_seen.gone(tx, f"worker-{CPU}")
        assert variants.settled(tx, newest), "nobody is there to run what is queued"
    unmeasured = ready(database, "{variants: [bf16], benchmark: false}", "d")
    ready(database, None, "e")
    finish_all(database)
    worker(database)
    with database.read() as tx:
        assert unmeasured not in {tx.get_one(Variant, variant_id).version_id for variant_id in variants.overdue(tx)}


def test_versions_come_before_variants_and_new_before_old(database: Database) -> None:
    """On a queue that both share, a new checkpoint is weighed first, and an old version's variants last."""
    ready(database, TWO, "a")
    ready(database, TWO, "b")
    with database.transaction() as tx:
        tx.execute(update(Job).values(queue="all"))
        record(tx, "c")
        tx.execute(update(Job).values(queue="all"))
        order = [job.key for job in jobs.unsent(tx, "all", 10, 30)]
    assert order == [
        "version:3:validate:1",
        "variant:5:compress::1",
        "variant:6:compress::1",
        "variant:2:compress::1",
        "variant:3:compress::1",
    ]


def test_tensors_of_shards_stand_beside_each_other(database: Database) -> None:
    """A repeated shard replaces its own rows only; each judgement has its report."""
    ready(database)
    rows = [VariantTensor(name=name, action="int8 per row", bytes_in=400, bytes_out=101) for name in ("b", "a")]
    kept = VariantTensor(name="b", action="kept", reason="lm_head is skipped", bytes_in=400, bytes_out=400)
    with database.transaction() as tx:
        variants.record_tensors(tx, 2, rows, 1)
        variants.record_tensors(tx, 2, [kept], 1)
        variants.record_tensors(tx, 2, [], 1)
        variants.record_tensors(tx, 2, rows[:1], 2)
        found = [(row.name, row.action, row.reason, row.bytes_out) for row in variants.tensors(tx, 2, 1)]
        assert found == [("a", "int8 per row", "", 101), ("b", "kept", "lm_head is skipped", 400)]
        assert len(variants.tensors(tx, 2, 2)) == 1


def test_fleets_look_for_better_when_nothing_more_is_to_come(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the last variant of a version ended; not after each one."""
    asked: list[int] = []
    ready(database)
    monkeypatch.setattr(rollouts, "improve", lambda tx, model_id, policies: asked.append(model_id))
    first, second = todo(database)
    with database.transaction() as tx:
        do(tx, first.id, Verdict.NOT_APPLICABLE)
        assert asked == []
        do(tx, second.id, Verdict.REJECTED)
        assert asked == [1]


def test_an_unknown_variant_is_named(database: Database) -> None:
    """The error says which."""
    with database.transaction() as tx, pytest.raises(NotFound, match="no variant with id 7"):
        variants.advance(tx, 7, actor="test")

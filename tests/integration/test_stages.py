"""The real stages behind the one task body, in this process: from a file in a bucket to rows and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.engines import make_checkpoint, weights
from safetensors.numpy import save_file
from sqlmodel import col, select

from weighbridge.registry import artifacts, champion, jobs, templates, versions
from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import JobState, VersionStatus
from weighbridge.registry.models import Alias, GateResult, Variant, Version
from weighbridge.registry.notify import LocalNotifier
from weighbridge.registry.recipe import NO_POLICY
from weighbridge.registry.settings import BrokerSettings
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import StorageUnavailable
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.pins import pin, pins_digest
from weighbridge.storage.protocols import Ref
from weighbridge.workers import queue
from weighbridge.workers.settings import WorkerSettings
from weighbridge.workers.stages import TorchStages
from weighbridge.workers.tasks import Worker

MODEL = "digits"


class Bench:
    """A bucket, a registry and one worker, in this process."""

    def __init__(self, db: Database, folder: Path, template: Any) -> None:
        self.db = db
        self.store = FolderStore(folder / "bucket", create=True, durable=False)
        self.blobs = Blobs(self.store, ".weighbridge")
        settings = WorkerSettings(cache=folder / "cache", retry_seconds=0)
        self.worker = Worker(
            db=db,
            notifier=LocalNotifier(),
            stages=TorchStages(db, self.store, self.blobs, settings),
            settings=settings,
            owner="test",
        )
        self.sender = queue.make_sender(BrokerSettings(url="memory://"), self.run)  # type: ignore[arg-type]
        self.folder = folder
        self.add_template(template, "small")

    def run(self, job_id: int) -> None:
        """The inline sender's runner: what follows goes through the same door."""
        self.worker.run_job(job_id)
        self.sweep()

    def sweep(self) -> None:
        with self.db.transaction() as tx:
            due = jobs.unsent(tx, "cpu", 10, 60)
        queue.send(self.db, self.sender, due)

    def drop(
        self,
        name: str,
        recipe: str | None = None,
        *,
        seed: int = 1,
        nan: int = 0,
        missing: int = 0,
        data: bytes = b"",
    ) -> Version:
        """Put a checkpoint into the bucket and record it, as intake does; return the version when its jobs are over."""
        key = f"{MODEL}/{name}.safetensors"
        made = make_checkpoint(self.folder / "made.safetensors", seed, nan=nan)
        data = data or made.read_bytes()
        files = [pin(self.store.put(key, data[: len(data) - missing] + bytes(missing)))]
        with self.db.transaction() as tx:
            recorded = versions.record(
                tx,
                model=MODEL,
                path=key,
                files=files,
                pins_digest=pins_digest(files),
                proof="P2",
                proof_reason="its header",
                recipe_text=recipe,
                policy=NO_POLICY,
                eval_pin=self.eval_pin(),
                seen=name,
                actor="intake",
            )
        queue.send(self.db, self.sender, recorded.jobs)
        with self.db.read() as tx:
            return versions.get(tx, MODEL, recorded.version.number)

    def eval_pin(self) -> Ref | None:
        try:
            return pin(self.store.head(f"{MODEL}/eval.safetensors"))
        except LookupError:
            return None

    def put_eval(self, rows: int = 32, labels: Any = None) -> None:
        rng = np.random.default_rng(0)
        labels = np.arange(rows) % 10 if labels is None else labels
        save_file(
            {"pixels": rng.random((rows, 64), np.float32), "labels": labels}, path := self.folder / "eval.safetensors"
        )
        self.store.put(f"{MODEL}/eval.safetensors", path.read_bytes())

    def add_template(self, template: Any, name: str) -> None:
        self.blobs.put_bytes(template.pt2)
        with self.db.transaction() as tx:
            templates.add(
                tx,
                name=name,
                digest=template.digest,
                fingerprint=template.fingerprint,
                parameters={name: one.model_dump(mode="json") for name, one in template.parameters.items()},
                inputs=[spec.model_dump(mode="json") for spec in template.inputs],
                outputs=[spec.model_dump(mode="json") for spec in template.outputs],
                actor="ada",
            )


@pytest.fixture
def bench(sqlite_url: str, opened: Callable[[str], Database], tmp_path: Path, digits_template: Any) -> Iterator[Bench]:
    db = opened(sqlite_url)
    yield Bench(db, tmp_path, digits_template)
    db.close()


def test_a_good_checkpoint_becomes_ready(bench: Bench) -> None:
    """Its artifact is in the store with all its blobs, its numbers and digests are rows."""
    bench.put_eval()
    version = bench.drop("a", "gates: [{metric: accuracy, min: 0.0}]")
    assert (version.status, version.evidence["evaluated"]) == (VersionStatus.READY, True)
    assert version.evidence["program"]
    assert version.source_digest
    assert version.id is not None
    with bench.db.read() as tx:
        slot = champion.slot(tx, version.model_id, version.number)
        assert slot is not None
        needed = artifacts.blobs(tx, slot.artifact)
        names = {metric.name for metric in artifacts.metrics(tx, version.id)}
        assert [file.digest is not None for file in versions.files(tx, version.id)] == [True]
        assert tx.scalars(select(GateResult.verdict)).all() == ["passed"]
    assert len(needed) == 4, "weights, template, golden and the manifest"
    assert all(bench.blobs.exists(digest) for digest in needed)
    assert {"accuracy", "f1"} <= names


def test_verdicts_come_with_their_reason(bench: Bench) -> None:
    """A NaN is rejected naming its tensor; so is a version whose gates have no evaluation set, or an unfit one."""
    nan = bench.drop("nan", nan=3)
    assert (nan.status, nan.reason) == (
        VersionStatus.REJECTED,
        "head.weight has 3 non-finite values of 160 (NaN or Inf)",
    )
    blind = bench.drop("blind", "gates: [{metric: accuracy, min: 0.5}]", seed=2)
    assert blind.status == VersionStatus.REJECTED
    assert "there is no eval.safetensors" in blind.reason
    bench.put_eval(labels=np.full(32, 99, np.int64))
    bad = bench.drop("bad", "gates: [{metric: accuracy, min: 0.5}]", seed=3)
    assert bad.status == VersionStatus.REJECTED


def test_an_overwritten_checkpoint_is_superseded(bench: Bench) -> None:
    """Content that changed since it was pinned is never mixed: the version ends, the new content is another one."""
    real = bench.worker.run_job

    def overwritten_first(job_id: object) -> None:
        if bench.store.head(f"{MODEL}/a.safetensors").size != 1:
            bench.store.put(f"{MODEL}/a.safetensors", b"x")
        real(job_id)

    object.__setattr__(bench.worker, "run_job", overwritten_first)
    assert bench.drop("a").status == VersionStatus.SUPERSEDED


def test_a_store_that_is_away_costs_no_attempt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job waits with the reason, however often; it goes on when the store is back."""
    away = StorageUnavailable("bucket digits: connection refused")
    tries = 0

    def refuse(*_: object, **__: object) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 5:
            raise away
        return opened(*_, **__)

    opened = bench.store.open
    monkeypatch.setattr(bench.store, "open", refuse)
    bench.drop("a")
    for _ in range(5):
        bench.sweep()
    with bench.db.read() as tx:
        job = jobs.get(tx, 1)
        assert (job.state, job.verdict) == (JobState.DONE, "passed")
        assert job.attempt == 6
        assert versions.get(tx, MODEL, 1).status == VersionStatus.READY


def test_the_champion_is_what_max_drop_compares_with(bench: Bench) -> None:
    """A version that is worse than what serves, on the same evaluation set, is rejected with both numbers."""
    rng = np.random.default_rng(0)
    inputs = 10 * rng.standard_normal((64, 64)).astype(np.float32)
    first = weights(1)
    labels = _predict(first, inputs)
    save_file({"pixels": inputs, "labels": labels}, path := bench.folder / "eval.safetensors")
    bench.store.put(f"{MODEL}/eval.safetensors", path.read_bytes())
    recipe = "gates: [{metric: accuracy, max_drop: 0.05}]"
    good = bench.drop("good", recipe, seed=1)
    assert good.status == VersionStatus.READY
    with bench.db.transaction() as tx:
        tx.add(Alias(model_id=good.model_id, name="champion", number=1))
    worse = bench.drop("worse", recipe, seed=7)
    assert worse.status == VersionStatus.REJECTED
    assert "champion 1's 1" in worse.reason
    with bench.db.read() as tx:
        failed = tx.scalars(select(GateResult).where(GateResult.verdict == "failed")).all()
    assert [(one.gate, one.limit) for one in failed] == [("accuracy.max_drop", 0.05)]


def test_zeros_that_the_champion_had_not_block_where_nothing_else_judges(bench: Bench) -> None:
    """Without a set the version is rejected; with one, or a gate that allows them, it is ready with a note."""
    assert bench.drop("first").status == VersionStatus.READY
    half = bench.drop("half", missing=200)
    assert half.status == VersionStatus.REJECTED
    assert "to the end of the file, and 3 more tensors: 200 bytes in all" in half.reason
    assert ", which version 1 had not: it looks like an unfinished download" in half.reason
    allowed = bench.drop("allowed", "gates: [{metric: tensors.zero_tail, max: 1000}]", seed=2, missing=200)
    assert allowed.status == VersionStatus.READY
    bench.put_eval()
    both = "gates: [{metric: tensors.zero_tail, max: 1000}, {metric: accuracy, min: 0.0}]"
    judged = bench.drop("judged", both, seed=3, missing=300)
    assert judged.status == VersionStatus.READY
    assert judged.facts["notes"][0].endswith(", which version 3 had not")
    assert any("every row is answered with class" in note for note in judged.facts["notes"])
    with bench.db.read() as tx:
        mine = select(GateResult.gate).join(Variant, col(Variant.id) == col(GateResult.variant_id))
        seen = tx.scalars(mine.where(col(Variant.version_id) == judged.id)).all()
    assert sorted(seen) == ["accuracy.min", "tensors.zero_tail.max"]
    assert bench.drop("set", seed=4, missing=400).status == VersionStatus.READY
    bench.put_eval(labels=np.full(32, 99, np.int64))
    unfit = bench.drop("unfit", seed=5, missing=500)
    assert unfit.status == VersionStatus.REJECTED, "a set that cannot judge is none"
    assert "unfinished download" in unfit.reason
    assert "eval.safetensors: labels" in unfit.reason


def _predict(made: dict[str, Any], inputs: Any) -> Any:
    """`small_mlp` in numpy."""
    hidden = (inputs * np.linspace(0.5, 1.5, 64, dtype=np.float32)) @ made["hidden.weight"].T + made["hidden.bias"]
    norm = (hidden - made["norm.running_mean"]) / np.sqrt(made["norm.running_var"] + 1e-5)
    hidden = np.maximum(norm * made["norm.weight"] + made["norm.bias"] + 0.25, 0)
    return (hidden @ made["head.weight"].T + made["head.bias"]).argmax(axis=1).astype(np.int64)

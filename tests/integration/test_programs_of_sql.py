"""Programs are those that SQL names, whatever a manifest says; a file of one that is damaged harms its own versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from sqlmodel import col, update

from tests.integration.test_stages import Bench
from weighbridge.engines import template
from weighbridge.engines.manifest import Manifest, Program, TensorSpec
from weighbridge.registry import champion
from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.registry.models import Template
from weighbridge.storage.in_place import InPlace
from weighbridge.workers import programs


@pytest.fixture
def bench(sqlite_url: str, opened: Callable[[str], Database], tmp_path: Path, digits_template: Any) -> Iterator[Bench]:
    db = opened(sqlite_url)
    yield Bench(db, tmp_path, digits_template)
    db.close()


def _prove(bench: Bench, digest: str) -> None:
    programs.prove(bench.db, InPlace(bench.blobs).path, digest)


def _artifact(bench: Bench) -> str:
    version = bench.drop("a")
    assert version.status == VersionStatus.READY, version.reason
    with bench.db.read() as tx:
        slot = champion.slot(tx, version.model_id, version.number)
    assert slot is not None
    return slot.artifact


def test_a_manifest_that_names_another_program_is_refused(bench: Bench) -> None:
    """With a digest that is right: nobody recorded that program with this artifact, whatever kind it says it is."""
    artifact = _artifact(bench)
    _prove(bench, artifact)
    good = Manifest.model_validate_json(bench.blobs.get(artifact))
    other = bench.blobs.put_bytes(b"another program").digest
    for program in (Program(kind="template", name="small", digest=other), Program(kind="onnx", name="x", digest=other)):
        forged = bench.blobs.put_bytes(good.model_copy(update={"program": program}).canonical()).digest
        with pytest.raises(programs.UnknownProgram, match=f"{forged}: its program {other} was not recorded"):
            _prove(bench, forged)


@pytest.mark.parametrize("change", [{"digest": "0" * 64}, {"name": "renamed"}])
def test_a_template_that_is_another_by_now_is_refused(bench: Bench, change: dict[str, str]) -> None:
    """Its row names other bytes, or is gone: what was bound to it is loaded no more."""
    artifact = _artifact(bench)
    with bench.db.transaction() as tx:
        tx.execute(update(Template).where(col(Template.name) == "small").values(**change))
    with pytest.raises(programs.UnknownProgram, match="not the registered template small"):
        _prove(bench, artifact)


@pytest.mark.parametrize("damage", ["other bytes", ""])
def test_a_damaged_program_harms_its_own_versions_only(bench: Bench, damage: str) -> None:
    """They wait for it to be added again, and say so; a checkpoint of another is judged as if it were whole."""
    with bench.db.read() as tx:
        digest = programs.templates.get(tx, "small").digest
    key = bench.blobs.key(digest)
    whole = bench.blobs.get(digest)
    if damage:
        bench.store.put(key, damage.encode())
    else:
        bench.store.delete(key)
    spec = TensorSpec(name="input", datatype="FP32", shape=(-1, 3))
    bench.add_template(template.build(torch.nn.Linear(3, 2), [spec]), "line")
    line = save({"weight": np.eye(2, 3, dtype=np.float32), "bias": np.ones(2, np.float32)})
    assert bench.drop("line", data=line).status == VersionStatus.READY
    waits = bench.drop("waits")
    assert (waits.status, "small is damaged in the store, add it again" in waits.reason) == ("needs_binding", True)
    bench.store.put(key, whole)
    assert bench.drop("later", seed=2).status == VersionStatus.READY

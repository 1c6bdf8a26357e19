"""What a recipe may take is the operator's to say: more is cut, and said to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from fixtures.house import House

from weighbridge.registry.errors import InvalidRecipe
from weighbridge.registry.recipe import NO_POLICY, Policy, effective, parse
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import StorageFull
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore

GREEDY = """
variants:
  - {method: prune-magnitude, calibration_rows: 65536,
     recover: {ranks: 12, batch: 2000000000, steps: 1000000}}
"""


def test_a_greedy_recipe_gets_what_the_policy_allows() -> None:
    """Twelve processes and two billion rows were obeyed; the defaults are those of one ordinary machine."""
    judge, ignored = effective(parse(GREEDY), NO_POLICY)
    (wish,) = judge.variants
    assert wish.recover is not None
    recover = wish.recover
    assert (recover.ranks, recover.batch, recover.steps, wish.calibration_rows) == (2, 4096, 10_000, 4096)
    where = "variants.prune-magnitude"
    assert ignored == [
        f"{where}.calibration_rows: 65536 is overruled by the policy (max_calibration_rows = 4096)",
        f"{where}.recover.ranks: 12 is overruled by the policy (max_ranks = 2)",
        f"{where}.recover.steps: 1000000 is overruled by the policy (max_steps = 10000)",
        f"{where}.recover.batch: 2000000000 is overruled by the policy (max_batch = 4096)",
    ]


def test_an_operator_may_allow_more_or_less() -> None:
    """A default that is cut is nobody's wish, and is not said to be ignored."""
    judge, ignored = effective(parse(GREEDY), Policy(max_ranks=16, max_batch=2**31, max_steps=10**6))
    assert judge.variants[0].recover == parse(GREEDY).variants[0].recover
    assert len(ignored) == 1
    judge, ignored = effective(parse("variants: [bf16, fp16]"), Policy(max_variants=1, max_calibration_rows=8))
    assert [(wish.name, wish.calibration_rows) for wish in judge.variants] == [("bf16", 8)]
    assert ignored == ["variants: fp16: overruled by the policy (max_variants = 1)"]


@pytest.mark.parametrize("shape", ["[1000000, 1000000]", "[-1, 65536, 65536]", f"[{', '.join(['1000'] * 30)}]"])
def test_a_shape_beyond_the_cap_is_no_recipe(shape: str) -> None:
    """There is no smaller shape that it could mean."""
    recipe = parse(f"inputs: [{{name: x, datatype: FP32, shape: {shape}}}]")
    with pytest.raises(InvalidRecipe, match=r"inputs\.x: [0-9,]+ numbers a row; the policy allows 67,108,864"):
        effective(recipe, NO_POLICY)
    effective(parse("inputs: [{name: x, datatype: FP32, shape: [-1, 4096, 4096, 3]}]"), NO_POLICY)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[House]:
    with ExitStack() as parts:
        yield House(tmp_path, parts, (Policy(max_checkpoint_bytes=1000),))


def test_a_checkpoint_beyond_the_cap_is_rejected_unread(small: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason has both numbers; nothing of it is opened or copied."""
    opened: list[str] = []
    monkeypatch.setattr(MemoryStore, "open", lambda self, key, **_: opened.append(key))
    small.publish("large", {"w": np.ones(1000, np.float32)})
    small.settle()
    version = small.version()
    assert version.status == "rejected"
    assert "bytes, the policy for * allows 1,000 (max_checkpoint_bytes): nothing of it was read" in version.reason
    assert opened == []


def test_what_would_fill_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 20 GB filled it again and again: by its length it is told beforehand, and the reserve stays."""
    blobs = Blobs(FolderStore(tmp_path))
    monkeypatch.setattr(FolderStore, "free_bytes", lambda _: 30_000_000_000)
    blobs.require_space(20_000_000_000, 10_000_000_000)
    with pytest.raises(StorageFull, match="20,000,000,001 bytes are to be written, 30,000,000,000 are free"):
        blobs.require_space(20_000_000_001, 10_000_000_000)
    Blobs(MemoryStore("anywhere")).require_space(1 << 60, 0)


def test_a_job_waits_for_space_and_says_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is ours, and no verdict; the job has not begun, and is due again by itself."""
    monkeypatch.setattr(MemoryStore, "free_bytes", lambda _: 17, raising=False)
    house.publish("monday", {"w": np.ones(4, np.float32)})
    house.settle()
    version = house.version()
    assert version.status == "discovered"
    (job,) = version.jobs
    assert (job.state, job.reason.partition(": ")[0]) == ("queued", "waits")
    assert "17 are free" in job.reason

"""Every hostile checkpoint ends soon, in little memory, with a verdict and a reason, and nothing of it runs."""

from __future__ import annotations

import re

import pytest
from fixtures.checkpoints import raw
from fixtures.confined import Bench
from fixtures.hostile import OTHER_FORMATS, SAMPLES, SENTINEL, Sample

from weighbridge.storage.completeness import Unsupported, look
from weighbridge.workers.confined.confine import Confine, Exceeded
from weighbridge.workers.confined.order import Limits
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.validate import quarantined

SECONDS, BYTES = 5.0, 512 << 20


def weigh(bench: Bench, path: str) -> tuple[Outcome, int, float]:
    """As workers.stages does it, with the limits of the settings; and the child's most memory and processor time."""
    task, used = bench.task(path), []
    desk = bench.desk(task)
    confine = Confine(bench.nursery.orders, Limits(), measured=lambda *seen: used.append(seen))
    try:
        outcome = confine.perform(task, desk, lambda: None)
    except Exceeded as exceeded:
        outcome = quarantined(task, desk, str(exceeded))
    ((size, seconds),) = used
    return outcome, size, seconds


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_hostile_checkpoint_is_a_verdict(bench: Bench, sample: Sample) -> None:
    """Also where the daemon, which refuses many of them at a look, would have let it pass."""
    folder = bench.drops / "run"
    folder.mkdir()
    for name, data in sample.build(bench.root).items():
        (folder / name).write_bytes(data)
    outcome, size, seconds = weigh(bench, "run/")
    assert outcome.verdict in ("quarantined", "rejected")
    assert re.search(sample.says, outcome.reason), outcome.reason[:1000]
    assert len(outcome.reason) < 1000
    assert outcome.reason.isprintable()
    assert "artifact_digest" not in outcome.facts
    assert not (bench.root / SENTINEL).exists()
    assert (size < BYTES, seconds < SECONDS) == (True, True), (size, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("count", [200_000])
def test_the_most_tensors_are_read_in_time(bench: Bench, count: int) -> None:
    """A header as large as any that is accepted costs seconds and megabytes, and is no fault."""
    tensors = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    (bench.drops / "many.safetensors").write_bytes(raw(tensors, bytes(range(1, 101)) * (count // 100)))
    outcome, size, seconds = weigh(bench, "many.safetensors")
    assert outcome.verdict == "needs_binding"
    assert (size < BYTES, seconds < SECONDS) == (True, True), (size, seconds)


@pytest.mark.parametrize("suffix", OTHER_FORMATS)
def test_other_formats_are_refused_unread(bench: Bench, suffix: str) -> None:
    """Whatever they hold: they become no version, and the reason says what to publish instead."""
    (bench.drops / f"model{suffix}").write_bytes(b"\x80\x04cposix\nsystem\n.")
    verdict = look(bench.source, f"model{suffix}")
    assert isinstance(verdict, Unsupported)
    assert "publish safetensors" in verdict.reason

"""Every hostile checkpoint ends soon, in little memory, with a verdict and a reason, and nothing of it runs."""

from __future__ import annotations

import re
import time
from itertools import cycle

import pytest
from fixtures.checkpoints import raw
from fixtures.confined import Bench
from fixtures.hostile import OTHER_FORMATS, SAMPLES, SENTINEL, Sample

from weighbridge.storage.completeness import Unsupported, look
from weighbridge.storage.safetensors_header import BITS, MAX_RANK, MAX_TENSORS
from weighbridge.workers.confined.confine import Confine, Exceeded
from weighbridge.workers.confined.order import Limits
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.validate import quarantined

SECONDS, BYTES = 15.0, 512 << 20
"""Of a processor: three times the aim of 5 s, which the machine that this was written on keeps. Others are slower."""


def weigh(bench: Bench, path: str) -> tuple[Outcome, int, float]:
    """As workers.stages does it, with the limits of the settings; and the child's most memory and the processor time of
    the child and of its worker together."""
    task, used = bench.task(path), []
    desk = bench.desk(task)
    began = time.process_time()
    confine = Confine(bench.nursery.orders, Limits(), measured=lambda *seen: used.append(seen))
    try:
        outcome = confine.perform(task, desk, lambda: None)
    except Exceeded as exceeded:
        outcome = quarantined(task, desk, str(exceeded))
    own = time.process_time() - began
    ((size, seconds),) = used
    return outcome, size, own + seconds


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


def _most(dtypes: str, axes: int) -> bytes:
    """A file of as many tensors as are accepted, each of one number, of these dtypes in turn."""
    header, at = {}, 0
    for number, dtype in zip(range(MAX_TENSORS), cycle(dtypes.split()), strict=False):
        end = at + BITS[dtype] // 8
        header[f"t{number}"] = {"dtype": dtype, "shape": [1] * axes, "data_offsets": [at, end]}
        at = end
    return raw(header, (bytes(range(1, 65)) * (at // 64 + 1))[:at])


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["F32", "F32 BF16 I16 U8"])
def test_the_most_tensors_are_read_in_time(bench: Bench, dtypes: str) -> None:
    """A header as large as any that is accepted costs seconds and megabytes, and is no fault."""
    (bench.drops / "many.safetensors").write_bytes(_most(dtypes, axes=1))
    outcome, size, seconds = weigh(bench, "many.safetensors")
    assert outcome.verdict == "needs_binding"
    assert (size < BYTES, seconds < SECONDS) == (True, True), (size, seconds)


@pytest.mark.slow
def test_the_most_tensors_of_the_most_axes_are_refused_in_time(bench: Bench) -> None:
    """Before all of them were read."""
    (bench.drops / "many.safetensors").write_bytes(_most("F32", axes=MAX_RANK))
    outcome, size, seconds = weigh(bench, "many.safetensors")
    assert (outcome.verdict, "axes together" in outcome.reason) == ("quarantined", True)
    assert (size < BYTES, seconds < SECONDS) == (True, True), (size, seconds)


@pytest.mark.parametrize("suffix", OTHER_FORMATS)
def test_other_formats_are_refused_unread(bench: Bench, suffix: str) -> None:
    """Whatever they hold: they become no version, and the reason says what to publish instead."""
    (bench.drops / f"model{suffix}").write_bytes(b"\x80\x04cposix\nsystem\n.")
    verdict = look(bench.source, f"model{suffix}")
    assert isinstance(verdict, Unsupported)
    assert "publish safetensors" in verdict.reason

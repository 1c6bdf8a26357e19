"""Zeros where bytes are missing are told from zeros that are meant, and block where nothing else will judge."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from fixtures.checkpoints import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from weighbridge.engines.stream import Inspector
from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.registry.errors import InvalidRecipe
from weighbridge.registry.recipe import ZERO_TAIL, Gate, parse
from weighbridge.storage.safetensors_header import header_length, parse_header
from weighbridge.workers import zero_tails
from weighbridge.workers.zero_tails import Before, Finding, find, judge

RNG = np.random.default_rng(0)


def stats(file: bytes) -> list[TensorStats]:
    """One pass over the file, in pieces."""
    header = parse_header(file[8 : 8 + header_length(file, "x", len(file))], "x")
    with Inspector(io.BytesIO(file), header) as inspector:
        while inspector.readinto(bytearray(100_000)):
            pass
        return inspector.stats()


def weights(**more: Any) -> dict[str, Any]:
    """Three matrices and biases, about 200 KB, none of them zero."""
    made = {f"{name}.weight": RNG.standard_normal((100, 150)).astype(np.float32) for name in "abc"}
    made |= {f"{name}.bias": RNG.standard_normal(100).astype(np.float32) for name in "abc"}
    return made | more


def before(file: bytes) -> Before:
    seen = zero_tails.facts(stats(file))
    return Before(7, seen["tensors"], seen["bytes"])


def blocks(findings: list[Finding]) -> bool:
    return bool([one for one in judge(findings, (), evaluated=False, before=None) if one.verdict == "failed"])


FILE = save(weights())
START = 8 + int.from_bytes(FILE[:8], "little")


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(START + 100, len(FILE) - 64), piece=st.sampled_from([1, 512, 4096, 16384]))
def test_a_file_whose_end_never_came_is_seen(cut: int, piece: int) -> None:
    """Wherever it ends: with a finished version before it, it blocks where no set will judge."""
    cut -= cut % piece
    if cut > START:
        half = FILE[:cut] + bytes(len(FILE) - cut)
        known = before(FILE)
        assert find(stats(half)), "seen without a version before, too"
        assert blocks(find(stats(half), zero_tails.comparable(known, stats(half))))


def test_a_first_file_that_ends_within_a_row_blocks() -> None:
    """No design begins its zeros in the middle of a row; the reason says how much, and what to do."""
    half = FILE[: START + 90_001] + bytes(len(FILE) - START - 90_001)
    findings = find(stats(half))
    (result,) = judge(findings, (), evaluated=False, before=None)
    assert result.verdict == "failed"
    assert "zero bytes (of 60,000), to the end of the file, and 2 more tensors" in result.reason
    assert "write it again, or allow it in recipe.yaml (gates: [{metric: tensors.zero_tail, max: " in result.reason
    (left,) = judge(findings, (), evaluated=True, before=None)
    assert left.verdict == "not_applicable", "an evaluation set judges it"
    assert zero_tails.left_to_set([left]) == left.reason


MEANT = {
    "a bias that begins at zero": weights(**{"c.bias": np.zeros(100, np.float32)}),
    "a LoRA matrix": weights(lora_B=np.zeros((100, 8), np.float32)),
    "a head of zeros at the end": weights(**{"z.weight": np.zeros((50, 100), np.float32)}),
    "two padding rows": weights(z=np.vstack([RNG.standard_normal((90, 64)), np.zeros((2, 64))]).astype(np.float32)),
}
DOUBTFUL = {
    "pages of padding rows": weights(z=np.vstack([RNG.standard_normal((90, 64)), np.zeros((48, 64))]).astype("f4")),
    "rows that are pages": {"w": np.vstack([np.ones((4, 1024)), np.zeros((4, 1024))]).astype("f4")},
    "a tail in the middle of the file": weights(b=np.r_[np.ones((64, 64)), np.zeros((64, 64))].astype("f4")),
    "half of a vector": weights(z=np.r_[np.ones(4000), np.zeros(4000)].astype(np.float32)),
}


@pytest.mark.parametrize("kind", MEANT)
def test_zeros_that_a_design_makes_warn_the_first_time_only(kind: str) -> None:
    """A note, no gate; the next version that has them too has not even a note, and one that has more is judged."""
    seen = stats(save(MEANT[kind]))
    findings = find(seen)
    assert findings
    assert not blocks(findings)
    known = before(save(MEANT[kind]))
    assert find(seen, zero_tails.comparable(known, seen)) == []


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_pages_of_zeros_at_a_tensors_end_block_the_first_time(kind: str) -> None:
    """A half of a download ends at a row's end wherever rows are pages: a set, a gate or a version before must tell."""
    seen = stats(save(DOUBTFUL[kind]))
    findings = find(seen)
    assert blocks(findings)
    (allowed,) = judge(findings, (Gate(metric=ZERO_TAIL, max=20_000),), evaluated=False, before=None)
    (left,) = judge(findings, (), evaluated=True, before=None)
    assert (allowed.verdict, left.verdict) == ("passed", "not_applicable")
    known = before(save(DOUBTFUL[kind]))
    assert find(seen, zero_tails.comparable(known, seen)) == []


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_sparse_weights_are_no_finding(share: float) -> None:
    """What chance leaves at the end of pruned tensors, and small counters that are zero."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pruned = {name: value * (rng.random(value.shape) > share) for name, value in weights().items()}
        file = save({name: value.astype(np.float32) for name, value in pruned.items()})
        assert [one for one in find(stats(file)) if one.unfinished] == []
    counted = weights(num_batches_tracked=np.zeros((), np.int64))
    assert find(stats(save(counted))) == []


def test_a_hole_in_the_middle_is_said() -> None:
    """Pieces that come out of order leave pages of zeros before values: new ones block, a first file's warn."""
    wide = save({"w": RNG.standard_normal((1000, 300)).astype(np.float32)})
    start = 8 + int.from_bytes(wide[:8], "little") + 50_000
    holed = wide[:start] + bytes(400_000) + wide[start + 400_000 :]
    findings = find(stats(holed))
    assert "w has a hole of 4" in findings[0].said
    assert not blocks(findings)
    assert blocks(find(stats(holed), before(wide)))


def test_shards_end_each_by_itself() -> None:
    """The end of a file is that of the tensors in it."""
    whole, cut = stats(save(weights())), stats(FILE[:-80] + bytes(80))
    assert [one.size for one in find([*cut, *whole])] == [80]
    assert [one.size for one in find([*whole, *cut])] == [80]
    assert "to the end of the file" in find([*cut, *whole])[0].said


def test_other_tensors_are_not_compared() -> None:
    """A version before with other shapes says nothing of these zeros."""
    seen = stats(save(MEANT["a LoRA matrix"]))
    assert zero_tails.comparable(before(FILE), seen) is None
    assert zero_tails.comparable(None, seen) is None
    assert zero_tails.comparable(before(save(MEANT["a LoRA matrix"])), seen) is not None


def test_a_gate_says_how_many_bytes_may_be_zero() -> None:
    """It takes the place of the default in both directions, and passes with its number where there is none."""
    findings = find(stats(save(MEANT["a LoRA matrix"])))
    (strict,) = judge(findings, (Gate(metric=ZERO_TAIL, max=0),), evaluated=True, before=None)
    assert (strict.verdict, strict.observed, strict.limit) == ("failed", 3200, 0)
    half = find(stats(FILE[: START + 90_001] + bytes(len(FILE) - START - 90_001)))
    (loose,) = judge(half, (Gate(metric=ZERO_TAIL, max=1e9),), evaluated=False, before=None)
    assert loose.verdict == "passed"
    (none,) = judge([], (Gate(metric=ZERO_TAIL, max=0),), evaluated=False, before=None)
    assert (none.verdict, none.observed) == ("passed", 0)
    assert parse("gates: [{metric: tensors.zero_tail, max: 0}]").gates[0].max == 0
    for wrong in ("min: 1", "max_drop: 0.1", "max: 1, min: 1"):
        with pytest.raises(InvalidRecipe, match=r"tensors\.zero_tail takes max alone"):
            parse(f"gates: [{{metric: tensors.zero_tail, {wrong}}}]")


def test_empty_tensors_and_odd_dtypes_end_in_nothing() -> None:
    """No element, one element, bytes."""
    file = safetensors(
        {"none": ("F32", [0, 4], b""), "one": ("F32", [], b"\0\0\x80?"), "raw": ("U8", [100], b"\1" * 100)}
    )
    assert find(stats(file)) == []

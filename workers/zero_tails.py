"""Zeros where bytes are missing: a tensor that ends in whole pages of them, or has such a hole, may never have arrived.

A downloader makes a file as long as it will be and fills it in; what it did not reach reads as zeros. So do layers that
begin as zeros, padding rows of an embedding, and pruned weights: what the version before had too is no finding, what
chance gives a sparse tensor neither, and a tensor that is wholly zero the first time is a warning only. Pure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.registry.recipe import ZERO_TAIL, Gate
from weighbridge.registry.schemas import GateResult
from weighbridge.storage.streaming import digest_bytes
from weighbridge.words import counted

PAGE = 4096
SMALL = 64
"""Bytes below which zeros at the end of a file, or a tensor of them, say nothing."""
_CHANCE = math.log(1e-9)
MOST = 4096
"""Tensors whose zeros the facts keep for the version that follows."""


@dataclass(frozen=True)
class Before:
    """The version before: its number, which tensors it had, and their zeros, as `facts` said it."""

    number: int
    tensors: str
    zeros: Mapping[str, int]


@dataclass(frozen=True)
class Finding:
    """`size` bytes of zeros in a tensor, in words. `unfinished`: a design rarely makes them."""

    tensor: str
    size: int
    said: str
    unfinished: bool


def facts(stats: Sequence[TensorStats]) -> dict[str, Any]:
    """What a later version is compared with: {"tensors": their digest, "bytes": {name: zeros at its end and in its
    largest hole}}; empty where too many tensors have zeros to say."""
    found = {one.name: _bytes(one) for one in stats if _bytes(one) >= SMALL}
    return {"tensors": _digest(stats), "bytes": found} if len(found) <= MOST else {}


def comparable(before: Before | None, stats: Sequence[TensorStats]) -> Before | None:
    """The version before, where its tensors were the same by name, shape and dtype."""
    return before if before is not None and before.tensors == _digest(stats) else None


def _digest(stats: Sequence[TensorStats]) -> str:
    rows = sorted([one.name, one.dtype, list(one.shape)] for one in stats)
    return digest_bytes(json.dumps(rows, separators=(",", ":")).encode())


def find(stats: Sequence[TensorStats], before: Before | None = None) -> list[Finding]:
    """The findings in the order of the files, beyond what the version before had."""
    return [finding for one, to_end in _with_ends(stats) if (finding := _judge(one, to_end, before)) is not None]


def note(findings: Sequence[Finding], before: Before | None) -> str:
    """One line of them all; the worst first."""
    first = max(findings, key=lambda one: (one.unfinished, one.size))
    others = len(findings) - 1
    more = f", and {counted(others, 'more tensor')}: {sum(one.size for one in findings):,} bytes in all"
    which = f", which version {before.number} had not" if before is not None else ""
    return f"{first.said}{more if others else ''}{which}"


def judge(
    findings: Sequence[Finding], gates: Sequence[Gate], *, evaluated: bool, before: Before | None
) -> list[GateResult]:
    """By the gates that name them; where none does, by whether they look unfinished. Where `evaluated`, a set will tell
    that: what it would have failed is left to it, as *not applicable*."""
    size = float(sum(one.size for one in findings))
    asked = [gate.max for gate in gates if gate.metric == ZERO_TAIL and gate.max is not None]
    said = f"{ZERO_TAIL}: {note(findings, before)}" if findings else f"{ZERO_TAIL}: none"
    results = [_result(size <= limit, size, limit, f"{said} ({size:,.0f} bytes, max {limit:,.0f})") for limit in asked]
    if not asked and any(one.unfinished for one in findings):
        allow = f"gates: [{{metric: {ZERO_TAIL}, max: {size:.0f}}}]"
        why = f"{said}: it looks like an unfinished download, and no evaluation tells whether it is: write it again"
        failed = _result(False, size, 0.0, f"{why}, or allow it in recipe.yaml ({allow})")
        results.append(failed.model_copy(update={"verdict": "not_applicable"}) if evaluated else failed)
    return results


def left_to_set(results: Sequence[GateResult]) -> str:
    """Why the version may not be served if no set judges it after all; empty: nothing is in doubt."""
    return next((one.reason for one in results if one.verdict == "not_applicable"), "")


def _result(passed: bool, size: float, limit: float, reason: str) -> GateResult:
    verdict = "passed" if passed else "failed"
    return GateResult(gate=f"{ZERO_TAIL}.max", verdict=verdict, observed=size, limit=limit, reason=reason)


def _judge(one: TensorStats, to_end: int, before: Before | None) -> Finding | None:
    """`to_end`: bytes of zeros from within this tensor to the end of its file, 0 where they do not reach it."""
    tail, whole = one.zero_tail, one.zero_tail == one.nbytes
    told = whole and tail >= SMALL
    told |= not whole and not _by_chance(one, tail) and (_pages(one) > 0 or to_end >= SMALL)
    told |= whole and to_end >= SMALL
    hole = one.hole if one.hole >= PAGE and not _by_chance(one, one.hole) else 0
    size = (tail if told else 0) + hole
    if not size or (before is not None and size <= before.zeros.get(one.name, 0)):
        return None
    return Finding(one.name, size, _said(one, tail if told else 0, hole, to_end), _unfinished(one, told, before))


def _unfinished(one: TensorStats, told: bool, before: Before | None) -> bool:
    """Against a version before, any; else an end within a tensor that holds a page, or begins in the middle of a row.

    Rows are often whole pages, so that where they end says little; a tensor that is wholly zero is usually meant.
    """
    if before is not None:
        return True
    if not told or one.zero_tail == one.nbytes:
        return False
    row = one.nbytes // one.shape[0] if len(one.shape) > 1 else one.zero_tail
    return _pages(one) > 0 or one.zero_tail % row != 0


def _said(one: TensorStats, tail: int, hole: int, to_end: int) -> str:
    if not tail:
        return f"{one.name} has a hole of {hole:,} zero bytes (of {one.nbytes:,})"
    where = ", to the end of the file" if to_end else ""
    if tail == one.nbytes:
        return f"{one.name} is wholly zero ({tail:,} bytes){where}"
    return f"{one.name} ends in {tail:,} zero bytes (of {one.nbytes:,}){where}"


def _by_chance(one: TensorStats, size: int) -> bool:
    """Whether a tensor as sparse as the rest of it has such a run now and then."""
    width = one.nbytes // one.count
    run = size // width
    rest, zero = one.count - run, one.zeros - run
    if run <= 0 or rest <= 0 or zero <= 0:
        return run <= 0
    return run * math.log(zero / rest) > _CHANCE - math.log(rest) if zero < rest else True


def _pages(one: TensorStats) -> int:
    """Whole pages of the file in the run that it ends in."""
    end = one.offset + one.nbytes
    return max(0, end // PAGE - -(-(end - one.zero_tail) // PAGE))


def _bytes(one: TensorStats) -> int:
    return one.zero_tail + (one.hole if one.hole >= PAGE else 0)


def _with_ends(stats: Sequence[TensorStats]) -> Iterator[tuple[TensorStats, int]]:
    """Every tensor with its `to_end`."""
    found, run = [], 0
    for one in reversed(stats):
        if one.last:
            run = 0
        reaches = one.last or run > 0
        run = run + one.zero_tail if reaches else 0
        found.append((one, run if reaches and one.zero_tail else 0))
        run = run if one.zero_tail == one.nbytes else 0
    return reversed(found)

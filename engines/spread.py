"""How far the answers of a golden vary, and so what a difference in them means. Imports without torch.

An absolute tolerance passes anything where outputs are small, a relative one where they are small differences of large
numbers. So a tolerance is a share of the *scale*: the deviation of a column (the last axis) over the golden's rows, in
two views, as it is and relative to its row's mean (logits that share an offset say nothing by it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from weighbridge.engines.protocols import Array

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
_UNLIKELY = 1e-3
"""How often a golden may have a column whose few rows are nearer to each other than `_at_most` allows."""
_FILLED, _GAP, _SAME = 1e4, 1e3, 1e-2
"""A value that stands for "masked": one number, larger than this, and so many times larger than every other."""


class Tolerance(NamedTuple):
    """|seen − wanted| ≤ atol + rtol · |wanted| + spread · scale, each ≥ 0; `spread` 0 knows no scale."""

    rtol: float
    atol: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """What is wrong, as the end of a sentence; `worst` is the largest excess over what is allowed."""

    said: str
    worst: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output of a golden with what each element may differ by, as it is (`allowed`) and in its row (`within`)."""

    values: Array
    tolerance: Tolerance
    plain: Mask
    """Elements that are compared as numbers; the others are infinite, NaN or a filling, and stay what they are."""
    allowed: Floats
    within: Floats | None = None

    @classmethod
    def of(cls, values: Array, tolerance: Tolerance) -> Wanted:
        """Learn the scales of an output from the whole of it."""
        wide = values.astype(np.float64)
        plain = np.isfinite(wide)
        base = tolerance.atol + tolerance.rtol * np.abs(wide)
        if not tolerance.spread or values.dtype.kind in "iub":
            return cls(values, tolerance, plain, base)
        plain &= ~_filling(wide, plain)
        allowed = base + tolerance.spread * scales(wide, plain)
        if wide.ndim < 2 or wide.shape[-1] < 2:
            return cls(values, tolerance, plain, allowed)
        centred, means = _in_row(wide, plain)
        within = base + tolerance.rtol * np.abs(means) + tolerance.spread * scales(centred, plain)
        return cls(values, tolerance, plain, allowed, within)

    def row(self, index: int) -> Wanted:
        """One row, as a batch of one; what it may differ by is what the whole says."""
        part = slice(index, index + 1)
        cut = replace(self, values=self.values[part], plain=self.plain[part], allowed=self.allowed[part])
        return cut if self.within is None else replace(cut, within=self.within[part])

    def differs(self, seen: Array) -> Difference | None:
        """None where `seen` is what was wanted."""
        if seen.shape != self.values.shape:
            return Difference(f"has shape {list(seen.shape)}, not {list(self.values.shape)}", math.inf)
        if self.tolerance.spread and self.values.dtype.kind in "iub":
            return self._other_numbers(seen)
        got, want = seen.astype(np.float64), self.values.astype(np.float64)
        if wrong := self._other_marks(got, want):
            return wrong
        pairs = [(got, want, self.allowed, "")]
        if self.within is not None:
            pairs.append((_in_row(got, self.plain)[0], _in_row(want, self.plain)[0], self.within, " within its row"))
        return next((wrong for one in pairs if (wrong := self._beyond(*one))), None)

    def _beyond(self, got: Floats, want: Floats, allowed: Floats, where: str) -> Difference | None:
        difference = np.abs(got[self.plain] - want[self.plain])
        excess = difference - allowed[self.plain]
        if (excess <= 0).all():
            return None
        at = int(np.nan_to_num(excess, nan=np.inf).argmax())
        said = f"differs by up to {difference[at]:.3g}{where} (allowed there: {allowed[self.plain][at]:.3g})"
        return Difference(said, float(np.nan_to_num(excess[at], nan=np.inf)))

    def _other_numbers(self, seen: Array) -> Difference | None:
        """Whole numbers are names (classes, tokens): near is not the same, but a tie may fall otherwise."""
        wrong, count = int((seen != self.values).sum()), self.values.size
        if wrong <= int(self.tolerance.spread * count):
            return None
        return Difference(f"differs in {wrong:,} of {count:,} whole numbers", float(wrong))

    def _other_marks(self, got: Floats, want: Floats) -> Difference | None:
        marks = ~self.plain
        if not marks.any():
            return None
        infinite = marks & ~np.isfinite(want)
        filled = marks & np.isfinite(want)
        same = np.array_equal(got[infinite], want[infinite], equal_nan=True)
        if same and (np.abs(got[filled] - want[filled]) <= _SAME * np.abs(want[filled])).all():
            return None
        return Difference("has other values where it should be NaN, infinite or masked", math.inf)


def scales(values: Floats, plain: Mask) -> Floats:
    """How far each element's column varies, in its own unit; of the shape of `values`. Only `plain` elements count.

    Rows that are few say little of a column: it may vary more than they show, but not more than the whole output does.
    """
    columns, counted = _columns(values), _columns(plain)
    count = counted.sum(0)
    means = np.where(counted, columns, 0).sum(0) / np.maximum(count, 1)
    squares = (np.where(counted, columns - means, 0) ** 2).sum(0)
    freedom = np.maximum(count - 1, 0)
    deviations = np.sqrt(squares / np.maximum(freedom, 1))
    pooled = math.sqrt(squares.sum() / freedom.sum()) if freedom.any() else 0.0
    pooled = pooled or _of_elements(values[plain])
    clipped = (counted & (columns == 0)).any(0)  # a ReLU's zero hides how large the column is
    most = np.where(clipped | (freedom == 0), pooled, np.minimum(pooled, deviations * _at_most(freedom)))
    found: Floats = np.broadcast_to(np.maximum(deviations, most), values.shape or (1,)).reshape(values.shape)
    return found


def _of_elements(values: Floats) -> float:
    """Where no row differs from another: the deviation of all elements, or of a constant its size."""
    if not values.size:
        return 0.0
    return float(values.std()) or float(np.abs(values).max())


def _at_most(freedom: npt.NDArray[np.int64]) -> Floats:
    """By how much a deviation of so many degrees of freedom understates the true one in one of 1/_UNLIKELY goldens.

    The lower tail of χ² is (x/2)^(ν/2) / Γ(ν/2 + 1) at small x.
    """
    kinds, places = np.unique(freedom, return_inverse=True)
    rare = math.log(_UNLIKELY / freedom.size)
    factors = []
    for degrees in np.maximum(kinds, 1).tolist():
        half = math.exp(min(0.0, 2 / degrees * (rare + math.lgamma(degrees / 2 + 1)) + math.log(2 / degrees)))
        factors.append(1 / math.sqrt(half))
    found: Floats = np.array(factors)[places.reshape(freedom.shape)]
    return found


def _columns(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """[samples, columns]: the last axis of a matrix, all of a vector."""
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)


def _in_row(values: Floats, plain: Mask) -> tuple[Floats, Floats]:
    """Values relative to the mean of their row's plain elements, and the means."""
    count = np.maximum(plain.sum(-1, keepdims=True), 1)
    means: Floats = np.where(plain, values, 0).sum(-1, keepdims=True) / count
    with np.errstate(invalid="ignore"):
        return values - means, means


def _filling(values: Floats, plain: Mask) -> Mask:
    """Where one number stands for −∞, as masks have it (−1e9, the least of a dtype)."""
    sizes = np.abs(np.where(plain, values, 0))
    top = float(sizes.max(initial=0.0))
    large = plain & (sizes >= top / _GAP)
    if top < _FILLED or large.sum() == plain.sum():
        return np.zeros_like(plain)
    only = np.ptp(values[large]) <= _SAME * top
    return large if only else np.zeros_like(plain)

"""Pictures of quality: what is kept against the size, and the classes' F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from weighbridge.registry.schemas import Variant
from weighbridge.report import picture, words
from weighbridge.report.picture import BAD, INK, MUTED, PAPER, Look, Picture
from weighbridge.report.subject import ORIGINAL, Subject, metric
from weighbridge.words import counted

MOST_CLASSES = 30
"""Classes that a picture shows; of more, those that changed most. The table has them all."""
_LEAST_F1 = 0.05
"""The shortest axis of F1 that is drawn."""
_MEASURES = (
    ("kept", "quality.keep", "share of the original's metric kept"),
    ("top1", "quality.min_top1", "rows whose first answer stays the same"),
    ("cosine", "quality.min_cosine", "mean cosine with the original's outputs"),
)


@dataclass(frozen=True)
class Point:
    """One variant: `size` as a share of the original's; `low` is the bound that the gate looked at."""

    name: str
    size: float
    kept: float
    low: float | None
    status: str


@dataclass(frozen=True)
class Kept:
    """The points of one measure. `front` names those that none beats in size and quality both."""

    words: str
    points: Sequence[Point]
    limits: Sequence[float]
    front: Sequence[str]


def kept(subject: Subject) -> Kept | None:
    """By the first measure that any variant has; None where nothing was measured."""
    base = subject.original_size
    for name, gate, said in _MEASURES:
        found = [point for one in subject.variants if base and (point := _point(one, name, base)) is not None]
        if found:
            limits = {g.limit for v in subject.variants for g in v.gates if g.gate == gate and g.limit is not None}
            points = [Point(ORIGINAL, 1.0, 1.0, None, "ready"), *found]
            return Kept(said, points, sorted(limits), front(points))
    return None


def _point(one: Variant, name: str, base: int) -> Point | None:
    value = metric(one, name)
    if value is None or not one.size or one.name == ORIGINAL:
        return None
    return Point(one.name, one.size / base, value, metric(one, "kept_bound") if name == "kept" else None, one.status)


def front(points: Sequence[Point]) -> list[str]:
    """Names, smallest first: those in service that no other is smaller than and keeps as much as."""
    allowed = sorted((p for p in points if p.status == "ready"), key=lambda p: (p.size, -p.kept, p.name))
    found: list[Point] = []
    for one in allowed:
        if not found or one.kept > found[-1].kept:
            found.append(one)
    return [one.name for one in found]


def quality_against_size(seen: Kept, styles: Mapping[str, Look]) -> Picture:
    """Points with their bounds, the front as a stair, the gates as dashed lines; names with their marks beside.

    No line joins a name to its point: between equal points and a column of names it would be a slope of nothing.
    """
    floor = _floor(seen)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        picture.grid(axes)
        top = max(1.0, *(p.kept for p in seen.points))
        axes.set_ylim(floor, top + 0.06 * (top - floor))
        right = max(p.size for p in seen.points) * 1.06
        axes.set_xlim(-0.03 * right, right)
        for limit in seen.limits:
            axes.axhline(limit, color=BAD, linestyle="--", linewidth=1)
            axes.annotate(
                f"gate {words.percent(limit, 2)}", (0, limit), (4, 3), textcoords="offset points", color=BAD, fontsize=8
            )
        stair = sorted((p.size, p.kept) for p in seen.points if p.name in seen.front)
        axes.step(*zip(*stair, strict=True), where="post", color=MUTED, linewidth=1, zorder=1)
        for point in seen.points:
            _mark(axes, point, styles[point.name], floor)
        _names(axes, seen, styles, floor)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("size of the weights, share of the original's")
        axes.set_ylabel(seen.words)

    description = (
        f"{counted(len(seen.points), 'form')} of the version by size and {seen.words}. "
        f"On the Pareto front: {', '.join(map(words.short, seen.front))}. The table of variants has the numbers."
    )
    tall = max(3.6, 0.8 + 0.21 * len(seen.points))
    return picture.draw("kept", "Quality kept against size", description, (8.6, tall), paint)


def _floor(seen: Kept) -> float:
    """The lower end of the axis: near the gate, so that good variants can be told apart; worse ones lie on the edge.

    Never above the gate: beside what is allowed a difference of nothing looks like nothing.
    """
    limit = min(seen.limits, default=0.99)
    allowed = max(1 - limit, 0.0025)
    least = min(min(p.kept, p.low if p.low is not None else p.kept) for p in seen.points)
    return max(min(least - 0.1 * (1 - least), 1 - allowed), 1 - 4 * allowed, 0.0)


def _mark(axes: Axes, point: Point, look: Look, floor: float) -> None:
    if point.kept < floor:
        axes.plot(point.size, floor, "v", color=look.color, markersize=7, clip_on=False, zorder=3)
        return
    if point.low is not None:
        axes.plot([point.size] * 2, [max(point.low, floor), point.kept], color=look.color, linewidth=1, zorder=2)
    filled = look.color if point.status == "ready" else PAPER
    size = 10 if look.marker == "*" else 6.5
    marker = {"marker": look.marker, "markersize": size, "markerfacecolor": filled, "markeredgecolor": look.color}
    axes.plot(point.size, point.kept, linestyle="", zorder=3, **marker)  # type: ignore[arg-type]


def _names(axes: Axes, seen: Kept, styles: Mapping[str, Look], floor: float) -> None:
    """A column of names on the right, as far apart as letters are high: so none covers another."""
    ordered = sorted(seen.points, key=lambda p: (-p.kept, p.size, p.name))
    for place, point in enumerate(ordered):
        y = 1 - (place + 0.5) / len(ordered)
        said = words.short(point.name) + (f"  ▼ {words.percent(point.kept)}" if point.kept < floor else "")
        on_front, look = point.name in seen.front, styles[point.name]
        axes.text(
            1.08,
            y,
            said + ("" if point.status == "ready" else f" ({point.status})"),
            transform=axes.transAxes,
            va="center",
            fontsize=8.5,
            color=INK,
            fontweight="bold" if on_front else "normal",
        )
        filled = look.color if point.status == "ready" else PAPER
        axes.plot(1.06, y, look.marker, color=look.color, markerfacecolor=filled, transform=axes.transAxes,
                  clip_on=False, markersize=8 if look.marker == "*" else 5)  # fmt: skip


@dataclass(frozen=True)
class Classes:
    """F1 by class, by variant. `names` as the registry gave them."""

    names: Sequence[str]
    f1: Mapping[str, Mapping[str, float]]
    support: Mapping[str, float]
    served: Sequence[str] = ()
    """The variants that passed."""

    def floor(self, names: Sequence[str]) -> float:
        """Where an axis begins that shows those that passed apart; others may lie below it."""
        good = [
            scores[n] for variant, scores in self.f1.items() if variant in self.served for n in names if n in scores
        ]
        least = min((scores[n] for scores in self.f1.values() for n in names if n in scores), default=0.0)
        if not good:
            return 0.0
        room = max(0.02, 0.5 * (max(good) - min(good)))
        return max(0.0, min(good) - room) if least < min(good) - room else 0.0

    def change(self, name: str) -> float:
        """The largest loss of any variant against the original."""
        base = self.f1.get(ORIGINAL, {}).get(name)
        others = [scores[name] for scores in self.f1.values() if name in scores]
        return max((base - one for one in others), default=0.0) if base is not None else 0.0


def classes(subject: Subject) -> Classes | None:
    """None where no class has an F1."""
    found: dict[str, dict[str, float]] = {}
    support: dict[str, float] = {}
    for one in subject.variants:
        for row in one.metrics:
            if not row.slice.startswith("class="):
                continue
            label = row.slice.removeprefix("class=")
            if row.name == "f1":
                found.setdefault(one.name, {})[label] = row.value
            elif row.name == "support":
                support.setdefault(label, row.value)
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    served = [one.name for one in subject.variants if one.status == "ready"]
    return Classes(names, found, support, served) if names else None


def f1_by_class(seen: Classes, styles: Mapping[str, Look]) -> Picture:
    """One line for each class, one mark for each variant on it."""
    shown = list(seen.names)
    if len(shown) > MOST_CLASSES:
        most = set(sorted(shown, key=lambda name: (-seen.change(name), name))[:MOST_CLASSES])
        shown = [name for name in shown if name in most]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        picture.grid(axes)
        floor = seen.floor(shown)
        for name, scores in seen.f1.items():
            places = [(scores[label], row) for row, label in enumerate(shown) if label in scores]
            if not places:
                continue
            look = styles[name]
            size = 9 if name == ORIGINAL else 5
            for row in (row for f1, row in places if f1 < floor):
                axes.plot(floor, row, "<", color=look.color, markersize=6, clip_on=False)
            xs, ys = zip(*places, strict=True)
            axes.plot(xs, ys, look.marker, color=look.color, markersize=size, label=words.short(name), alpha=0.85)
        if floor:
            axes.set_xlim(left=floor)
        picture.at_least(axes.xaxis, _LEAST_F1)
        axes.set_xlim(right=min(1.005, axes.get_xlim()[1]))
        axes.tick_params(axis="y", pad=9)
        axes.set_yticks(range(len(shown)), [words.short(name, 20) for name in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_ylabel("class")
        axes.set_xlabel("F1 (a triangle at the left edge: less than shown)" if floor else "F1")
        figure.legend(loc="outside right upper")

    some = f"the {len(shown)} of {len(seen.names)} classes that changed most" if len(shown) < len(seen.names) else ""
    title = f"F1 by class{': ' + some if some else ''}"
    description = (
        f"F1 of {counted(len(shown), 'class', 'classes')}, for the original and {counted(len(seen.f1) - 1, 'variant')}."
    )
    return picture.draw("classes", title, description, (8.6, max(2.6, 0.9 + 0.24 * len(shown))), paint)

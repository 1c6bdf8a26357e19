"""Pictures of speed on one kind of hardware: latencies, ratios, and what batches and callers do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import inf

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from weighbridge.registry.schemas import BenchmarkRow, VariantBenchmark
from weighbridge.report import picture, words
from weighbridge.report.picture import INK, LINE, MUTED, Look, Picture
from weighbridge.report.subject import ORIGINAL, Device, serving_row, serving_rows
from weighbridge.words import counted

Styles = Mapping[str, Look]
_LEAST_RATIO = 2.0
"""Between the ends of the shortest axis of times, rates and ratios that is drawn."""


def ecdf(row: BenchmarkRow) -> tuple[list[float], list[float]]:
    """Seconds and the share of requests that took at most so long: of a histogram all that is known."""
    # No logarithmic axis holds nought or +Inf, which foreign histograms may have.
    counts = sorted((float(bound), count) for bound, count in row.histogram.items() if 0 < float(bound) < inf)
    total = sum(count for _, count in counts)
    if not total:
        return [], []
    return [bound for bound, _ in counts], [done / total for done in accumulate(count for _, count in counts)]


def latencies(name: str, device: Device, styles: Styles) -> Picture | None:
    """One stair for each variant; None where no histogram was kept."""
    rows = {variant: row for variant, one in device.facts.items() if (row := serving_row(one)) and row.histogram}
    if not rows:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        picture.grid(axes)
        for share, said in ((0.5, "p50"), (0.99, "p99")):
            axes.axhline(share, color=MUTED, linewidth=0.8, linestyle=":")
            axes.annotate(said, (1, share), (3, 0), xycoords="axes fraction", textcoords="offset points",
                          color=MUTED, fontsize=8, va="center")  # fmt: skip
        for variant, row in rows.items():
            xs, ys = ecdf(row)
            if not xs:
                continue
            # A bound is twenty to the decade: what lies below the first one is above the bound before it.
            xs, ys = [xs[0] / 10 ** (1 / 20), *xs], [0.0, *ys]
            look = styles[variant]
            axes.step(xs, ys, where="post", color=look.color, linestyle=look.dash, label=_named(device, variant),
                      linewidth=2.2 if variant == ORIGINAL else 1.5)  # fmt: skip
        axes.set_xscale("log")
        picture.at_least(axes.xaxis, _LEAST_RATIO)
        _log(axes.xaxis, words.round_time)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("latency of one request at a time")
        axes.set_ylabel("requests that took at most so long")
        figure.legend(loc="outside right upper")

    fastest = min(rows, key=lambda variant: rows[variant].p50)
    description = (
        f"Cumulative distribution of the latency of {counted(len(rows), 'variant')} on {device.label}. "
        f"The lowest median has {words.short(fastest)} with {words.time(rows[fastest].p50)}. "
        "The table below has the percentiles."
        f"{_beside(device)}"
    )
    return picture.draw(f"{name}-latency", "Latency distributions", description, (8.6, 3.8), paint)


def ratios(name: str, device: Device, styles: Styles) -> Picture | None:
    """Bars from 1: how much faster, how much more a second; grey is what the original differs from itself by."""
    others = {variant: one for variant, one in device.facts.items() if one.speedup is not None and variant != ORIGINAL}
    if not others:
        return None

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        latency = {v: (_ratio(one), _interval(one)) for v, one in others.items()}
        ends = {v: _ends(one.throughput_low, one.throughput_high) for v, one in others.items()}
        throughput = {v: (one.throughput_ratio, ends[v]) for v, one in others.items()}
        for axes, title, seen in ((left, "latency (p50)", latency), (right, "throughput (best batch)", throughput)):
            _bars(axes, others, seen, styles)
            axes.set_title(f"{title}: × the original's", color=INK)
        left.set_yticks(range(len(others)), [words.short(variant) for variant in others])
        left.set_ylim(len(others) - 0.4, -0.6)

    faster = [words.short(variant) for variant, one in others.items() if one.finding == "faster"]
    description = (
        f"Speed of {counted(len(others), 'variant')} on {device.label} as multiples of the original's. "
        f"Faster by more than the spread: {', '.join(faster) or 'none'}. The table of variants has the numbers."
    )
    return picture.draw(
        f"{name}-ratio", "Speed beside the original", description, (8.6, 1.2 + 0.32 * len(others)), paint
    )


def _ratio(one: VariantBenchmark) -> float | None:
    """As measured: `speedup` says 1 for what the spread hides."""
    row = serving_row(one)
    return row.ratio if row and row.ratio is not None else one.speedup


def _interval(one: VariantBenchmark) -> tuple[float, float] | None:
    found = one.environment.get("speedup_interval")  # in rows of old
    old = (float(found[0]), float(found[1])) if isinstance(found, list) and len(found) == 2 else None
    return _ends(one.speedup_low, one.speedup_high) or old


def _ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _bars(
    axes: Axes,
    measured: Mapping[str, VariantBenchmark],
    seen: Mapping[str, tuple[float | None, tuple[float, float] | None]],
    styles: Styles,
) -> None:
    axes.set_xscale("log", base=2)
    picture.grid(axes, "x")
    ends = [1.0]
    for place, (variant, one) in enumerate(measured.items()):
        ratio, interval = seen[variant]
        spread = min(one.spread or 0.0, 0.9)
        axes.barh(place, 2 * spread, left=1 - spread, height=0.9, color=LINE, zorder=1)
        ends += [1 - spread, 1 + spread]
        if ratio is None or ratio <= 0:
            continue
        axes.barh(place, ratio - 1, left=1, height=0.5, color=styles[variant].color, zorder=2)
        if interval is not None:
            axes.plot(interval, [place, place], color=INK, linewidth=1, zorder=3)
        ends += [ratio, *(interval or ())]
        same = abs(ratio - 1) <= spread if interval is None else _same(one, interval)
        end = max([ratio, 1 + spread, *(interval or ())])
        axes.annotate("same" if same else words.times(ratio), (end, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8, color=INK)  # fmt: skip
    axes.axvline(1, color=MUTED, linewidth=1, zorder=4)
    axes.set_xlim(min(ends) / 1.15, max(ends) * (max(ends) / min(ends)) ** 0.25 * 1.1)
    picture.at_least(axes.xaxis, _LEAST_RATIO)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _same(one: VariantBenchmark, interval: tuple[float, float]) -> bool:
    """Rows of old have the spread beside their interval, not in it."""
    return interval[0] <= 1 <= interval[1] if one.speedup_low is not None else one.finding == "same"


def _ticks(low: float, high: float) -> list[float]:
    """Round ratios, as many as can be read."""
    if high / low > 4:
        return [2.0**power for power in range(-10, 11)]
    if high / low > 2:
        return [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]
    return [tenth / 10 for tenth in range(3, 18)]


def sweeps(name: str, device: Device, styles: Styles) -> Picture | None:
    """Rows a second against the batch (with the original's roof), and p99 against rows a second by callers."""
    batches = {variant: _sorted(one, "offline") for variant, one in device.facts.items()}
    callers = {variant: _sorted(one, "closed") for variant, one in device.facts.items()}
    if not any(len(rows) > 1 for rows in batches.values()):
        return None

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for variant, rows in batches.items():
            _line(left, variant, [(row.batch, row.throughput) for row in rows], styles, _named(device, variant))
        _roof(left, batches.get(ORIGINAL, []))
        _axes(left, "rows a request (batch)", "rows a second", lambda x: f"{x:,.0f}", _thousands)
        for variant, rows in callers.items():
            _line(right, variant, [(row.throughput, row.p99) for row in rows], styles, _named(device, variant))
        _axes(right, "rows a second, with more and more callers", "p99 latency", _thousands, words.round_time)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)

    description = (
        f"Left: rows a second against the batch on {device.label}, for {counted(len(batches), 'variant')}; "
        "dotted is what the original's batch of one would give if larger batches cost nothing, and the most that it "
        "reached. Right: p99 "
        f"against rows a second with more and more callers. The tables below have the numbers.{_beside(device)}"
    )
    tall = 3.9 + 0.2 * ((len(batches) + 4) // 4)
    return picture.draw(f"{name}-sweep", "Throughput against batch and load", description, (8.6, tall), paint)


def _sorted(one: VariantBenchmark, scenario: str) -> list[BenchmarkRow]:
    return sorted(serving_rows(one, scenario), key=lambda row: (row.batch, row.concurrency))


def _named(device: Device, variant: str) -> str:
    """With a star where its figures were measured beside other work."""
    return words.short(variant, 26) + (" *" if device.facts[variant].contended else "")


def _beside(device: Device) -> str:
    busy = any(one.contended for one in device.facts.values())
    return " * measured beside other work: such figures are no facts, only ratios are." if busy else ""


def _line(axes: Axes, variant: str, places: Sequence[tuple[float, float]], styles: Styles, label: str) -> None:
    look = styles[variant]
    size = 9 if variant == ORIGINAL else 4.5
    seen = [place for place in places if min(place) > 0]
    xs, ys = zip(*seen, strict=True) if seen else ((), ())
    axes.plot(xs, ys, color=look.color, linestyle=look.dash, marker=look.marker, markersize=size,
              label=label, linewidth=1.3)  # fmt: skip


def _roof(axes: Axes, rows: Sequence[BenchmarkRow]) -> None:
    """As of Williams' roofline: the slope of the smallest batch up to the most that was reached."""
    if len(rows) < 2:
        return
    first, peak = rows[0], max(row.throughput for row in rows)
    knee = first.batch * peak / first.throughput
    last = max(rows[-1].batch, knee)
    axes.plot([first.batch, knee, last], [first.throughput, peak, peak], ":", color=MUTED, linewidth=1.2,
              label="original's roof")  # fmt: skip


def _axes(axes: Axes, x: str, y: str, of_x: Callable[[float], str], of_y: Callable[[float], str]) -> None:
    picture.grid(axes)
    axes.set_xscale("log", base=2 if x.endswith("(batch)") else 10)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        picture.at_least(axis, _LEAST_RATIO)
    _log(axes.xaxis, of_x)
    _log(axes.yaxis, of_y)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _log(axis: Axis, said: Callable[[float], str]) -> None:
    low, high = sorted(axis.get_view_interval())
    if axis.get_transform().base == 10 and high / low < 1000:  # type: ignore[attr-defined]
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: said(value)))
    axis.set_minor_formatter(NullFormatter())


def _thousands(value: float) -> str:
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"

"""The picture of what compression did to each layer: signal to quantization noise, in dB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from weighbridge.report import picture, words
from weighbridge.report.picture import Look, Picture
from weighbridge.report.subject import Subject
from weighbridge.words import counted

_LEAST_DECIBELS = 6.0
"""The shortest axis that is drawn: a factor of two."""
MOST_ROWS = 60
"""Layers that get a line of their own; more become a strip of colours."""


@dataclass(frozen=True)
class Noise:
    """SQNR by variant and tensor; only tensors that some variant changed, in the order of the program."""

    names: Sequence[str]
    values: Mapping[str, Mapping[str, float]]


def noise(subject: Subject) -> Noise | None:
    """None where no tensor was changed in a way that can be compared."""
    found = {
        variant: {row.name: row.sqnr for row in rows if row.sqnr is not None}
        for variant, rows in subject.tensors.items()
    }
    values = {variant: rows for variant, rows in found.items() if rows}
    names = dict.fromkeys(row.name for rows in subject.tensors.values() for row in rows if row.sqnr is not None)
    return Noise(list(names), values) if names else None


def draw(seen: Noise, styles: Mapping[str, Look]) -> Picture:
    """Dots by layer, or a heat map of many layers."""
    worst = min((value, variant, name) for variant, rows in seen.values.items() for name, value in rows.items())
    description = (
        f"SQNR of {counted(len(seen.names), 'tensor')} in {counted(len(seen.values), 'variant')}. "
        f"The lowest is {worst[0]:.1f} dB: {words.short(worst[2])} in {words.short(worst[1])}. "
        "The tables below have the numbers."
    )
    title = "Signal to quantization noise by layer"
    if len(seen.names) > MOST_ROWS:
        return picture.draw("layers", title, description, (8.6, 1.6 + 0.3 * len(seen.values)), _strip(seen))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        picture.grid(axes)
        for variant, rows in seen.values.items():
            places = [(rows[name], row) for row, name in enumerate(seen.names) if name in rows]
            xs, ys = zip(*places, strict=True)
            look = styles[variant]
            axes.plot(xs, ys, look.marker, color=look.color, label=words.short(variant), markersize=4.5, alpha=0.85)
        axes.set_yticks(range(len(seen.names)), [words.short(name, 40) for name in seen.names], fontsize=8)
        axes.set_ylim(len(seen.names) - 0.4, -0.6)
        picture.at_least(axes.xaxis, _LEAST_DECIBELS)
        axes.set_xlabel("SQNR (dB); more is better")
        figure.legend(loc="outside right upper")

    return picture.draw("layers", title, description, (8.6, max(2.4, 1.0 + 0.17 * len(seen.names))), paint)


def _strip(seen: Noise) -> picture.Paint:
    """Variants above each other, layers in the order of the program; what is kept as it was stays empty."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        grid = np.array([[rows.get(name, np.nan) for name in seen.names] for rows in seen.values.values()])
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        room = max(0.0, _LEAST_DECIBELS - (high - low)) / 2
        seen_grid = np.ma.masked_invalid(grid)
        mesh = axes.pcolormesh(seen_grid, cmap="viridis", shading="flat", vmin=low - room, vmax=high + room)
        axes.set_yticks(np.arange(len(seen.values)) + 0.5, [words.short(name) for name in seen.values])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.set_xlabel(f"the {len(seen.names)} changed tensors, in the order of the program")
        bar = figure.colorbar(mesh, ax=axes, location="top", aspect=50, fraction=0.05)
        bar.set_label("SQNR (dB); more is better; empty: kept as it was", color=picture.MUTED)
        bar.solids.set_rasterized(False)  # type: ignore[union-attr]  # an embedded image would need another policy
        bar.outline.set_visible(False)

    return paint

"""A matplotlib figure as inline SVG: the same bytes for the same figure, coloured by the page, readable aloud.

Text stays text. matplotlib draws with stand-in colours, which become the page's CSS variables, so that one picture
suits light, dark and paper. Every id gets the picture's prefix: a page holds many.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
BAD = "#050505"
SERIES = tuple(f"#0600{place:02x}" for place in range(8))
"""Stand-ins; the style sheet has what they look like."""
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    BAD: "var(--bad)",
    **{colour: f"var(--s{place})" for place, colour in enumerate(SERIES)},
}
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":", "-.")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "weighbridge",
    "svg.image_inline": True,
    "text.parse_math": False,  # names from a bucket may hold $
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


Paint = Callable[[Figure], None]


@dataclass(frozen=True)
class Picture:
    """`svg` is safe markup: whatever was text in the figure is escaped in it."""

    title: str
    svg: Markup
    wide: float
    """CSS pixels that it asks for."""


@dataclass(frozen=True)
class Look:
    """How one variant is drawn, everywhere in a report."""

    color: str
    marker: str
    dash: str


def looks(names: list[str]) -> dict[str, Look]:
    """The first, the original, in ink; the others in eight colours, told apart by markers and dashes as well."""
    found = {}
    for place, name in enumerate(names[1:]):
        colour, dash = SERIES[place % len(SERIES)], _DASHES[place // len(SERIES) % len(_DASHES)]
        found[name] = Look(colour, _MARKERS[place % len(_MARKERS)], dash)
    return {name: Look(INK, "*", "-") for name in names[:1]} | found


def draw(name: str, title: str, description: str, size: tuple[float, float], paint: Paint) -> Picture:
    """Paint a figure of `size` inches and take it as SVG. `name` prefixes its ids."""
    drawn = StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names may hold letters that the bundled font has not; the reader's browser has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(drawn, format="svg", metadata=_METADATA)
    return Picture(title, Markup(_inline(drawn.getvalue(), name, title, description)), size[0] * 96)


def grid(axes: Axes, axis: str = "both") -> None:
    axes.grid(visible=True, axis=axis)  # type: ignore[arg-type]
    axes.tick_params(length=0, which="both")


def at_least(axis: Axis, span: float) -> None:
    """Widen an axis, around its middle, to a difference of `span`, a logarithmic one to such a ratio.

    Else a difference that is none is drawn as a slope from edge to edge.
    """
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log":
        if high / low < span:
            middle = (low * high) ** 0.5
            axis.set_view_interval(middle / span**0.5, middle * span**0.5, ignore=True)
    elif high - low < span:
        axis.set_view_interval((low + high - span) / 2, (low + high + span) / 2, ignore=True)


def _inline(document: str, name: str, title: str, description: str) -> str:
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^<>]*>", lambda tag: _tag(tag.group(), name), body)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None, "matplotlib writes a viewBox"
    said = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    head = f'<svg {box.group()} role="img" aria-labelledby="{name}-title {name}-desc">{said}'
    return head + body[body.index(">") + 1 :].rstrip()


def _tag(tag: str, name: str) -> str:
    """One tag (in text, < and > are escaped): ids under the picture's name, stand-ins as the page's colours."""
    tag = re.sub(r'\b(id="|xlink:href="#)', rf"\1{name}-", tag)
    tag = tag.replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    return re.sub(r"#0[1-6]0\d0\d", lambda found: _VARIABLES.get(found.group(), found.group()), tag)

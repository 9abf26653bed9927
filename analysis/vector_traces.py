"""Plotly's traces drawn on matplotlib's axes: scatter and bar. See vector.py."""

from __future__ import annotations

import base64
import html
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

INK, FAINT = "#1c2128", "#656d78"
MANY = 4000  # points of a trace; more become a picture inside the vector file, which would be megabytes otherwise
PX = 0.72  # points of a line or mark per pixel on the page, for the paper is smaller than the page

# What is drawn of a trace, and what means something on a screen alone.
DRAWN = {"x", "y", "error_x", "error_y", "mode", "name", "showlegend", "opacity", "marker", "line", "fill", "fillcolor",
         "orientation", "type", "meta"}  # fmt: skip
ON_SCREEN = {"text", "hovertemplate", "hoverinfo", "customdata", "legendgroup"}

DASHES: dict[str, Any] = {
    "solid": "-", "dash": (0, (5, 2.5)), "dot": (0, (1, 1.6)), "dashdot": "-.", "longdash": (0, (8, 3)),
}  # fmt: skip
SHAPES = {"linear": "default", "spline": "default", "hv": "steps-post", "vh": "steps-pre", "hvh": "steps-mid"}
SYMBOLS = {
    "circle": "o", "square": "s", "triangle-up": "^", "triangle-down": "v", "triangle-left": "<", "triangle-right": ">",
    "diamond": "D", "star": "*", "pentagon": "p", "hexagon": "h", "cross": "P", "x": "X", "cross-thin": "+",
    "x-thin": "x", "line-ns": "|", "line-ew": "_",
}  # fmt: skip


def draw(panel: Any, trace: dict[str, Any], place: int) -> None:
    """Draw one trace (plotly's dict), the `place`-th of its figure. ValueError where this module cannot."""
    kind = trace.get("type", "scatter")
    if kind not in ("scatter", "bar"):
        raise ValueError(f"vector figures have no trace {kind!r}: teach vector_traces.py")
    refuse_unknown(trace, DRAWN | ON_SCREEN, "trace")
    refuse_unknown(trace.get("marker", {}), {"color", "symbol", "size", "line"}, "marker")
    refuse_unknown(trace.get("line", {}), {"color", "width", "dash", "shape"}, "line")
    (_scatter if kind == "scatter" else _bar)(panel, trace, place)


def refuse_unknown(settings: dict[str, Any], known: set[str], of: str) -> None:
    """ValueError where the figure says something that would silently be missing on paper."""
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"vector figures do not know {', '.join(unknown)} of a {of}: teach {__name__}")


def plain(text: str) -> str:
    """Plotly's little markup as plain text."""
    return html.unescape(re.sub(r"</?(?:b|i|sub|sup|span)\b[^>]*>", "", re.sub(r"<br\s*/?>", "\n", str(text))))


def points(values: Any) -> Any:
    """Numbers as float array (None: NaN), names as a list."""
    if values is None:
        return np.array([])
    if isinstance(values, dict):  # as plotly stores arrays of a figure that was pickled or came from JSON
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).astype(np.float64)
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        return values.astype(np.float64)
    items = list(values)
    if any(isinstance(item, str) for item in items):
        return [plain(str(item)) for item in items]
    return np.array([math.nan if item is None else item for item in items], dtype=np.float64)


def colour(value: str) -> Any:
    """A CSS colour as matplotlib knows it."""
    found = re.fullmatch(r"rgba?\(([^)]*)\)", value.strip())
    if not found:
        return value
    red, green, blue, *alpha = (float(part) for part in found[1].split(","))
    return (red / 255, green / 255, blue / 255, *alpha)


def _label(trace: dict[str, Any]) -> str:
    """`=` and the name in the legend: matplotlib leaves out labels that begin with an underscore, ours never do."""
    name = plain(trace.get("name") or "")
    return f"={name}" if name and trace.get("showlegend", True) else "_"


def _ink(trace: dict[str, Any], of: dict[str, Any], place: int) -> Any:
    """The colour of a line or marker; the page fills in what has none (`meta` "ink")."""
    if trace.get("meta") == "ink":
        return INK
    found = of.get("color")
    return colour(found) if isinstance(found, str) else f"C{place % 10}"


def _scatter(panel: Any, trace: dict[str, Any], place: int) -> None:
    x, y = points(trace.get("x")), points(trace.get("y"))
    if len(x) == 0 or len(y) == 0:
        return
    mode = trace["mode"]
    if set(mode.split("+")) - {"lines", "markers"}:
        raise ValueError(f"vector figures have no mode {mode!r}: teach {__name__}")
    alpha = trace.get("opacity", 1.0)
    _fill(panel, trace, x, y)
    label = _label(trace)
    looks: dict[str, Any] = {"linestyle": "none", "marker": "none"}
    if "lines" in mode:
        line = trace.get("line", {})
        looks |= {
            "color": _ink(trace, line, place), "linewidth": line.get("width", 2) * PX,
            "linestyle": DASHES[line.get("dash", "solid")], "drawstyle": SHAPES[line.get("shape", "linear")],
        }  # fmt: skip
    if trace.get("line", {}).get("color"):  # as plotly: marks without a colour take their line's
        trace = trace | {"marker": {"color": trace["line"]["color"]} | trace.get("marker", {})}
    if "markers" in mode:
        looks |= _marks(trace, trace.get("marker", {}), place)
    if looks["linestyle"] != "none" or looks["marker"] != "none":
        looks = {"color": looks.get("markeredgecolor", INK)} | looks
        panel.plot(x, y, alpha=alpha, label=label, rasterized=len(x) > MANY, zorder=2.5, **looks)
    for error, name in (("error_y", "yerr"), ("error_x", "xerr")):
        _bars(panel, trace, x, y, error, name, alpha, place)


def _marks(trace: dict[str, Any], marker: dict[str, Any], place: int) -> dict[str, Any]:
    symbol = str(marker.get("symbol", "circle"))
    shape, ink = SYMBOLS[symbol.removesuffix("-open")], _ink(trace, marker, place)
    hollow = symbol.endswith("-open")
    edge = marker.get("line", {}).get("width", 1.5 if hollow or "thin" in symbol else 0)
    # Plotly's size is the width of the circle; its stars and triangles are larger than matplotlib's for the same size.
    size = marker.get("size", 6) * PX * (1.3 if shape in "*" else 0.85 if shape in "sD" else 1.0)
    return {
        "marker": shape, "markersize": size, "markeredgecolor": ink, "markeredgewidth": edge * PX,
        "markerfacecolor": "none" if hollow else ink,
    }  # fmt: skip


def _bars(panel: Any, trace: dict[str, Any], x: Any, y: Any, error: str, name: str, alpha: float, place: int) -> None:
    bars = trace.get(error)
    if not bars or bars.get("array") is None or bars.get("visible") is False:
        return
    more = np.nan_to_num(points(bars["array"]))
    less = more if bars.get("arrayminus") is None else np.nan_to_num(points(bars["arrayminus"]))
    ink = colour(bars["color"]) if bars.get("color") else _ink(trace, trace.get("marker", {}), place)
    width = bars.get("thickness", 1.5) * PX
    spread: dict[str, Any] = {name: np.vstack([less, more])}
    panel.errorbar(
        x, y, **spread, fmt="none", ecolor=ink, elinewidth=width, capsize=bars.get("width", 4) * PX / 2,
        capthick=width, alpha=alpha, zorder=2.4,
    )  # fmt: skip


def _fill(panel: Any, trace: dict[str, Any], x: Any, y: Any) -> None:
    kind = trace.get("fill", "none")
    if kind == "none":
        return
    if kind != "toself":
        raise ValueError(f"vector figures have no fill {kind!r}: teach {__name__}")
    for run in _runs(x, y):
        panel.fill(x[run], y[run], facecolor=colour(trace["fillcolor"]), linewidth=0, zorder=1)


def _runs(x: Any, y: Any) -> Iterator[slice]:
    """The stretches between two gaps."""
    gaps = np.flatnonzero(np.isnan(x) | np.isnan(y))
    edges = [-1, *gaps, len(x)]
    yield from (slice(low + 1, high) for low, high in itertools.pairwise(edges) if high - low > 1)


def _bar(panel: Any, trace: dict[str, Any], place: int) -> None:
    """One trace of bars; names stand in the order in which they come."""
    flat = trace.get("orientation") == "h"
    names, lengths = (points(trace[axis]) for axis in ("yx" if flat else "xy"))
    at = np.arange(len(names)) if isinstance(names, list) else names
    looks = {"color": _ink(trace, trace.get("marker", {}), place), "alpha": trace.get("opacity", 1.0), "zorder": 2}
    (panel.barh if flat else panel.bar)(at, lengths, 0.8, label=_label(trace), **looks)
    if isinstance(names, list):
        (panel.set_yticks if flat else panel.set_xticks)(at, names)

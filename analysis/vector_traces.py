"""Plotly's traces drawn on matplotlib's axes: scatter, bar, heatmap, parallel coordinates. See vector.py."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

INK, FAINT = "#1c2128", "#656d78"
MANY = 4000  # points of a trace; more become a picture inside the vector file, which would be megabytes otherwise
PX = 0.72  # points of a line or mark per pixel on the page, for the paper is smaller than the page

DASHES: dict[str, Any] = {
    "solid": "-", "dash": (0, (5, 2.5)), "dot": (0, (1, 1.6)), "dashdot": "-.", "longdash": (0, (8, 3)),
}  # fmt: skip
SHAPES = {"linear": "default", "spline": "default", "hv": "steps-post", "vh": "steps-pre", "hvh": "steps-mid"}
SYMBOLS = {
    "circle": "o", "square": "s", "triangle-up": "^", "triangle-down": "v", "triangle-left": "<", "triangle-right": ">",
    "diamond": "D", "star": "*", "pentagon": "p", "hexagon": "h", "cross": "P", "x": "X", "cross-thin": "+",
    "x-thin": "x", "line-ns": "|", "line-ew": "_",
}  # fmt: skip


def draw(panel: Any, trace: dict[str, Any], place: int, figure: dict[str, Any]) -> None:
    """Draw one trace of `figure` (plotly's dict). ValueError where this module cannot."""
    kinds: dict[str, Callable[..., None]] = {
        "scatter": _scatter, "scattergl": _scatter, "bar": _bar, "heatmap": _heatmap, "parcoords": _parallel,
    }  # fmt: skip
    kind = trace.get("type", "scatter")
    if kind not in kinds:
        raise ValueError(f"vector figures have no trace {kind!r}, only {', '.join(kinds)}: teach vector_traces.py")
    if trace.get("visible", True) is True:
        kinds[kind](panel, trace, place, figure)


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


def _scatter(panel: Any, trace: dict[str, Any], place: int, figure: dict[str, Any]) -> None:
    x, y = points(trace.get("x")), points(trace.get("y"))
    if len(x) == 0 or len(y) == 0:
        return
    mode = trace.get("mode") or ("lines+markers" if len(x) < 20 else "lines")
    alpha = trace.get("opacity", 1.0)
    _fill(panel, trace, x, y, alpha, figure, place)
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
    if "markers" in mode and _varies(trace):
        _varied_marks(panel, trace, x, y, alpha, place)
    elif "markers" in mode:
        looks |= _marks(trace, trace.get("marker", {}), place)
    if looks["linestyle"] != "none" or looks["marker"] != "none":
        looks = {"color": looks.get("markeredgecolor", INK)} | looks
        panel.plot(x, y, alpha=alpha, label=label, rasterized=len(x) > MANY, zorder=2.5, **looks)
    for error, name in (("error_y", "yerr"), ("error_x", "xerr")):
        _bars(panel, trace, x, y, error, name, alpha, place)
    if "text" in mode:
        for at_x, at_y, words in zip(x, y, trace.get("text", ()), strict=False):
            panel.annotate(plain(words), (at_x, at_y), (0, 5), textcoords="offset points", ha="center", fontsize=7.5)


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


def _varies(trace: dict[str, Any]) -> bool:
    marker = trace.get("marker", {})
    return any(not isinstance(marker.get(name, ""), (str, int, float)) for name in ("color", "size", "symbol"))


def _varied_marks(panel: Any, trace: dict[str, Any], x: Any, y: Any, alpha: float, place: int) -> None:
    """Markers whose colour or size differs from point to point."""
    marker = trace["marker"]
    names = [marker.get(name) for name in ("color", "size", "symbol")]
    colours, sizes, symbols = (
        [value] * len(x) if value is None or isinstance(value, (str, int, float)) else list(value) for value in names
    )
    numbers = np.array([np.nan] * len(x))
    if any(isinstance(value, (int, float, np.number)) for value in colours):
        numbers = np.array(colours, dtype=np.float64)
        low, high = marker.get("cmin", np.nanmin(numbers)), marker.get("cmax", np.nanmax(numbers))
        scale = _colours(marker.get("colorscale"))
        inks: list[Any] = [scale((value - low) / ((high - low) or 1)) for value in numbers]
        if marker.get("showscale"):
            _scale(panel, scale, low, high, marker.get("colorbar", {}))
    else:
        inks = [f"C{place % 10}" if value is None else colour(value) for value in colours]
    groups: dict[str, list[int]] = {}
    for at, symbol in enumerate(symbols):
        groups.setdefault(str(symbol or "circle"), []).append(at)
    for number, (symbol, at) in enumerate(groups.items()):
        hollow = symbol.endswith("-open")
        chosen = [inks[index] for index in at]
        panel.scatter(
            np.asarray(x)[at], np.asarray(y)[at], [((sizes[index] or 6) * PX) ** 2 for index in at],
            marker=SYMBOLS[symbol.removesuffix("-open")], alpha=alpha, zorder=3, linewidths=1.0 if hollow else 0,
            facecolors="none" if hollow else chosen, edgecolors=chosen, label=_label(trace) if number == 0 else "_",
            rasterized=len(x) > MANY,
        )  # fmt: skip


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


def _fill(panel: Any, trace: dict[str, Any], x: Any, y: Any, alpha: float, figure: dict[str, Any], place: int) -> None:
    kind = trace.get("fill", "none")
    if kind in (None, "none"):
        return
    looks = {"facecolor": colour(trace.get("fillcolor", "rgba(125,133,144,0.2)")), "linewidth": 0, "alpha": None}
    if kind == "toself":
        for run in _runs(x, y):
            panel.fill(x[run], y[run], **looks, zorder=1)
    elif kind == "tonexty":
        below = figure["data"][place - 1]
        under_x, under_y = points(below.get("x")), points(below.get("y"))
        panel.fill(np.concatenate([x, under_x[::-1]]), np.concatenate([y, under_y[::-1]]), **looks, zorder=1)
    elif kind == "tozeroy":
        panel.fill_between(x, 0, y, **looks, zorder=1)
    else:
        raise ValueError(f"vector figures have no fill {kind!r}: teach vector_traces.py")


def _runs(x: Any, y: Any) -> Iterator[slice]:
    """The stretches between two gaps."""
    gaps = np.flatnonzero(np.isnan(x) | np.isnan(y))
    edges = [-1, *gaps, len(x)]
    yield from (slice(low + 1, high) for low, high in zip(edges, edges[1:], strict=False) if high - low > 1)


def _bar(panel: Any, trace: dict[str, Any], place: int, figure: dict[str, Any]) -> None:
    flat = trace.get("orientation") == "h"
    names, lengths = (points(trace[axis]) for axis in ("yx" if flat else "xy"))
    bars = [other for other in figure["data"] if other.get("type") == "bar"]
    mode, count, turn = figure["layout"].get("barmode", "group"), len(bars), bars.index(trace)
    room = 1 - figure["layout"].get("bargap", 0.2)
    at, ticks = _places(panel, names, bars, "y" if flat else "x")
    width, start = room, np.zeros(len(at))
    if mode in ("stack", "relative"):
        before = getattr(panel, "stacked", {})
        start = np.array([before.get((where, length >= 0), 0.0) for where, length in zip(at, lengths, strict=True)])
        for where, length in zip(at, np.nan_to_num(lengths), strict=True):
            before[where, length >= 0] = before.get((where, length >= 0), 0.0) + length
        panel.stacked = before
    elif mode == "group":
        width = room / count
        at = at + (turn - (count - 1) / 2) * width
    if trace.get("base") is not None:
        start = np.broadcast_to(points(np.atleast_1d(trace["base"])), start.shape)
    marker = trace.get("marker", {})
    inks = marker.get("color")
    inks = _ink(trace, marker, place) if inks is None or isinstance(inks, str) else [colour(ink) for ink in inks]
    looks = {"color": inks, "alpha": trace.get("opacity", 1.0), "label": _label(trace), "zorder": 2}
    if flat:
        panel.barh(at, lengths, width, left=start, **looks)
        _bars(panel, trace, start + lengths, at, "error_x", "xerr", 1.0, place)
    else:
        panel.bar(at, lengths, width, bottom=start, **looks)
        _bars(panel, trace, at, start + lengths, "error_y", "yerr", 1.0, place)
    if ticks:
        (panel.set_yticks if flat else panel.set_xticks)(range(len(ticks)), ticks)


def _places(panel: Any, names: Any, bars: list[dict[str, Any]], axis: str) -> tuple[Any, list[str]]:
    """Where the bars stand: numbers stay, names count from 0 in the order in which all bars bring them."""
    if not isinstance(names, list):
        return names, []
    order = list(dict.fromkeys(name for bar in bars for name in points(bar[axis])))
    return np.array([order.index(name) for name in names], dtype=np.float64), order


def _heatmap(panel: Any, trace: dict[str, Any], place: int, figure: dict[str, Any]) -> None:
    z = np.array([[math.nan if value is None else value for value in row] for row in trace["z"]], dtype=np.float64)
    low = trace["zmin"] if trace.get("zmin") is not None else np.nanmin(z)
    high = trace["zmax"] if trace.get("zmax") is not None else np.nanmax(z)
    scale = _colours(trace.get("colorscale"))
    panel.imshow(z, cmap=scale, vmin=low, vmax=high, aspect="auto", origin="lower", interpolation="nearest")
    for names, set_ in ((trace.get("x"), panel.set_xticks), (trace.get("y"), panel.set_yticks)):
        if names is not None:
            shown = [plain(name) if isinstance(name, str) else f"{name:g}" for name in names]
            every = max(1, len(shown) // 40)
            crowded = set_ == panel.set_xticks and sum(map(len, shown)) > 70
            set_(range(0, len(shown), every), shown[::every], **({"rotation": 45, "ha": "right"} if crowded else {}))
    if trace.get("texttemplate"):
        for (row, column), value in np.ndenumerate(z):
            dark = np.isfinite(value) and sum(scale((value - low) / ((high - low) or 1))[:3]) < 1.5
            panel.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color="w" if dark else INK)
    if trace.get("showscale", True):
        _scale(panel, scale, low, high, trace.get("colorbar", {}))


def _parallel(panel: Any, trace: dict[str, Any], place: int, figure: dict[str, Any]) -> None:
    """A vertical axis per dimension, a line per row, coloured by `line.color`."""
    from matplotlib.collections import LineCollection

    dimensions = [each for each in trace["dimensions"] if each.get("visible", True)]
    heights = []
    panel.set_xlim(-0.2, len(dimensions) - 0.8)
    panel.set_ylim(-0.04, 1.08)
    panel.set_axis_off()
    for at, dimension in enumerate(dimensions):
        values = points(dimension["values"])
        low, high = dimension.get("range") or (np.nanmin(values), np.nanmax(values))
        heights.append((values - low) / ((high - low) or 1))
        panel.plot([at, at], [0, 1], color=FAINT, linewidth=0.8)
        panel.text(at, 1.05, plain(dimension.get("label", "")), ha="center", va="bottom", fontsize=8)
        ticks = dimension.get("tickvals")
        ticks = np.linspace(low, high, 5) if ticks is None else points(ticks)
        names = dimension.get("ticktext") or [f"{value:.3g}" for value in ticks]
        for value, name in zip(ticks, names, strict=False):
            height = (value - low) / ((high - low) or 1)
            panel.text(at - 0.03, height, plain(name), ha="right", va="center", fontsize=7, zorder=4)
    line = trace.get("line", {})
    rows = np.stack(heights, axis=1)
    lines = [np.column_stack([np.arange(len(row)), row]) for row in rows]
    numbers = points(line.get("color")) if not isinstance(line.get("color"), str) else np.zeros(len(rows))
    low, high = line.get("cmin", np.nanmin(numbers)), line.get("cmax", np.nanmax(numbers))
    scale = _colours(line.get("colorscale"))
    drawn = LineCollection(lines, array=numbers, cmap=scale, linewidths=0.8, alpha=0.6, rasterized=len(rows) > MANY)
    drawn.set_clim(low, high)
    panel.add_collection(drawn)
    if line.get("showscale"):
        _scale(panel, scale, low, high, line.get("colorbar", {}))


def _colours(scale: Any) -> Any:
    """A plotly colour scale as a matplotlib colour map."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap

    if scale is None or isinstance(scale, str):
        return mpl.colormaps[(scale or "viridis").lower()]
    return LinearSegmentedColormap.from_list("scale", [(position, colour(ink)) for position, ink in scale])


def _scale(panel: Any, scale: Any, low: float, high: float, bar: dict[str, Any]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    drawn = panel.figure.colorbar(ScalarMappable(Normalize(low, high), scale), ax=panel, shrink=0.9, pad=0.02)
    drawn.outline.set_visible(False)
    drawn.set_label(plain((bar.get("title") or {}).get("text", "")).replace("\n", " "))
    if bar.get("tickvals") is not None:
        drawn.set_ticks(points(bar["tickvals"]), labels=[plain(text) for text in bar.get("ticktext", bar["tickvals"])])

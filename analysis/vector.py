"""Figures as SVG and PDF for paper and slides: matplotlib draws what the plotly figure says, no browser needed.

A figure is described once, by plotly (figures.py and its like). This module and vector_traces.py know the few kinds of
traces and settings that those use and refuse what they do not know: a figure on paper never silently lacks what the
page has.

Why so: plotly's own export needs a Chrome beside Python and took 12 s for twelve figures in two formats (88 s one by
one) where matplotlib takes 3 s.
"""

from __future__ import annotations

import importlib.util
import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import vector_font, vector_traces
from analysis.vector_traces import FAINT, INK, PX, plain, points
from raysparse.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go

Description = dict[str, Any]  # see `describe`

FORMATS = ("svg", "pdf")
WIDTH_IN = 6.3  # the text width of a page with the usual margins
PX_PER_IN = 110.0  # a figure 440 px high on the page is 4 in high on paper
CURVES_DPI = 300  # of long curves, which are drawn as pictures
LEGEND_COLUMNS = 5
LEGEND_SIGNS = 92  # that stand side by side in a legend as wide as the figure; a mark takes eight
TITLE_SIGNS_PER_IN = 12  # of an axis title

# What is drawn of a layout and of an axis, and what means something on a screen alone or is always so on paper.
DRAWN = {"xaxis", "yaxis", "height", "annotations", "showlegend"}
ON_SCREEN = {"template", "margin", "font", "paper_bgcolor", "plot_bgcolor", "hovermode", "hoverlabel", "legend"}
AXIS = {"title", "type", "range", "rangemode", "tickvals", "ticktext", "tickformat", "dtick", "autorange",
        "showticklabels", "showgrid", "ticks", "visible", "side"}  # fmt: skip
AXIS_ON_SCREEN = {"automargin", "showline", "ticklen", "zeroline"}

STYLE = {
    "font.family": list(vector_font.FAMILY),
    "font.size": 9.0,
    "legend.fontsize": 8.5,
    "axes.labelsize": 9.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dfe3e8",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a trial's name is a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "raysparse",  # same records, same bytes
}


def missing() -> str | None:
    """What to install where matplotlib is not there; None where it is."""
    if importlib.util.find_spec("matplotlib"):
        return None
    return "no figures as SVG and PDF: they need matplotlib, install it with `pip install 'matplotlib>=3.9'`"


def describe(figure: go.Figure) -> Description:
    """What plotly knows of a figure, as plain dicts and arrays: `{"data": [...], "layout": {...}}`."""
    # Not figure.to_dict(): that has arrays as base64, for browsers.
    return {"data": [trace.to_plotly_json() for trace in figure.data], "layout": figure.layout.to_plotly_json()}


def files(described: Description) -> dict[str, bytes]:
    """`{"svg": ..., "pdf": ...}` of one figure. UsageError where matplotlib is not installed."""
    if reason := missing():
        raise UsageError(reason)
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        drawn = draw(described)
        # Once for both formats: it takes as long as drawing.
        drawn.get_layout_engine().execute(drawn)
        drawn.set_layout_engine("none")
        return {kind: _bytes(drawn, kind) for kind in FORMATS}


def draw(described: Description) -> Any:
    """The figure as a matplotlib Figure. ValueError names what this module cannot draw."""
    from matplotlib.figure import Figure

    vector_font.register()
    layout = described["layout"]
    vector_traces.refuse_unknown(layout, DRAWN | ON_SCREEN, "layout")
    drawn = Figure(figsize=(WIDTH_IN, layout.get("height", 440) / PX_PER_IN), layout="constrained")
    panel = drawn.add_subplot()
    for place, trace in enumerate(described["data"]):
        vector_traces.draw(panel, trace, place)
    for which in "xy":
        _axis(panel, which, layout.get(f"{which}axis", {}))
    for note in layout.get("annotations", ()):
        _annotate(panel, note)
    _legend(drawn, panel, layout)
    return drawn


def _bytes(drawn: Any, kind: str) -> bytes:
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.BytesIO()
    drawn.set_dpi(CURVES_DPI)  # each format leaves its own
    # Not savefig: it goes through the whole figure once more before it draws, a fifth of the time, for the same bytes.
    if kind == "svg":
        FigureCanvasSVG(drawn).print_svg(stream, metadata={"Date": None})
    else:
        FigureCanvasPdf(drawn).print_pdf(stream, metadata={"CreationDate": None})
    return stream.getvalue()


def _axis(panel: Any, which: str, axis: dict[str, Any]) -> None:
    from matplotlib.ticker import NullLocator

    vector_traces.refuse_unknown(axis, AXIS | AXIS_ON_SCREEN, "axis")
    set_ = {name: getattr(panel, f"set_{which}{name}") for name in ("label", "lim", "scale", "ticks")}
    this = panel.xaxis if which == "x" else panel.yaxis
    length = panel.get_figure().get_size_inches()[int(which == "y")] * 0.75
    set_["label"](textwrap.fill(plain(axis.get("title", {}).get("text", "")), int(length * TITLE_SIGNS_PER_IN)))
    log = axis.get("type") == "log"
    if log:
        set_["scale"]("log")
    if axis.get("range") is not None:
        low, high = (10**end if log else end for end in axis["range"])
        set_["lim"](low, high)
    elif axis.get("rangemode") == "tozero":
        set_["lim"](**({"left": 0} if which == "x" else {"bottom": 0}))
    if axis.get("tickvals") is not None:
        this.set_minor_locator(NullLocator())
        shown = axis.get("ticktext", axis["tickvals"])
        set_["ticks"](points(axis["tickvals"]), [plain(str(text)) for text in shown])
    else:
        _ticks(this, axis, log)
    if axis.get("autorange") == "reversed":
        this.set_inverted(True)
    if axis.get("showticklabels") is False:
        this.set_ticklabels([])
    if axis.get("ticks") == "":
        this.set_tick_params(length=0, which="both")
    # As plotly: grid lines unless said otherwise; behind bars and boxes of names they would only be noise.
    panel.grid(axis.get("showgrid", True) and axis.get("visible", True), axis=which)
    this.set_visible(axis.get("visible", True))
    if axis.get("side") in ("top", "right"):
        getattr(this, f"tick_{axis['side']}")()
    if not axis.get("visible", True):
        panel.spines[["left", "right"] if which == "y" else ["bottom", "top"]].set_visible(False)


def _ticks(axis: Any, settings: dict[str, Any], log: bool) -> None:
    """Numbers as plotly's `tickformat` says; on logarithmic axes 1, 2 and 5 of each decade in plain figures."""
    from matplotlib import ticker

    wanted = settings.get("tickformat", "")
    if wanted.endswith("s"):
        axis.set_major_formatter(ticker.EngFormatter(sep=""))
    elif wanted.endswith("%"):
        axis.set_major_formatter(ticker.PercentFormatter(1, decimals=None))
    if log:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axis.set_minor_formatter(ticker.NullFormatter())
        if not wanted:
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    elif isinstance(axis.get_major_locator(), ticker.AutoLocator):
        axis.set_major_locator(ticker.MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))


def _annotate(panel: Any, note: dict[str, Any]) -> None:
    """Words at data coordinates, on a ground that keeps them legible over lines."""
    vector_traces.refuse_unknown(
        note, {"x", "y", "text", "showarrow", "xanchor", "xshift", "yanchor", "yshift"}, "note"
    )
    across = {"left": "left", "right": "right"}.get(note.get("xanchor", ""), "center")
    up = {"top": "top", "bottom": "bottom"}.get(note.get("yanchor", ""), "center")
    shift = (note.get("xshift", 0) * PX, note.get("yshift", 0) * PX)
    ground = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "boxstyle": "square,pad=0.1"}
    panel.annotate(
        plain(note["text"]), (note["x"], note["y"]), shift, textcoords="offset points", ha=across, va=up, fontsize=7.5,
        bbox=ground, zorder=4,
    )  # fmt: skip


def _legend(drawn: Any, panel: Any, layout: dict[str, Any]) -> None:
    """Outside of the axes: it can hide nothing."""
    found: dict[str, Any] = {}
    for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
        found.setdefault(_shortened(label.removeprefix("="), LEGEND_SIGNS - 8), handle)
    if layout.get("showlegend", len(found) > 1) and found:
        drawn.legend(
            found.values(), found.keys(), loc="outside upper left", ncols=_columns(list(found)), columnspacing=1.4,
            handletextpad=0.8, borderaxespad=0.2, markerscale=0.9,
        )  # fmt: skip


def _columns(names: list[str]) -> int:
    """As many columns as fit beside each other; matplotlib fills them from top to bottom."""
    for columns in range(min(LEGEND_COLUMNS, len(names)), 1, -1):
        split = np.array_split([len(name) for name in names], columns)
        if sum(int(lengths.max()) + 8 for lengths in split) <= LEGEND_SIGNS:
            return columns
    return 1


def _shortened(text: str, signs: int) -> str:
    return text if len(text) <= signs else f"{text[: signs - 1]}…"

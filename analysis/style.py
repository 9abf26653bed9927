"""One look for all figures: a colour, a symbol and a dash per method, and a layout without ground or ink colours.

The page's script sets ink, grid and ground from its style sheet, so that one figure serves light and dark. The series
colours keep a contrast of at least 3 : 1 against both.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

# Known methods keep their colour whatever else is in the sweep; others take the rest in order of their names.
KNOWN = {
    "dense": ("#7d8590", "circle"),
    "static": ("#d9730d", "square"),
    "magran": ("#159a72", "triangle-up"),
    "rigl": ("#3b82d6", "diamond"),
}
OTHERS = (
    ("#a765d8", "star"),
    ("#d64d7e", "pentagon"),
    ("#8f8a12", "hexagon"),
    ("#0f95a8", "cross"),
    ("#b5651d", "triangle-down"),
)
FADED = 0.7  # opacity of what carries no claim


def looks(methods: list[str]) -> dict[str, tuple[str, str]]:
    """method -> (colour, marker symbol)."""
    unknown = [name for name in sorted(methods) if name not in KNOWN]
    return {
        name: KNOWN[name] if name in KNOWN else OTHERS[unknown.index(name) % len(OTHERS)] for name in sorted(methods)
    }


def translucent(colour: str, alpha: float) -> str:
    """`#rrggbb` as `rgba(r,g,b,alpha)`."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def figure(x: str, y: str, height: int = 440, **layout: Any) -> go.Figure:
    """An empty figure with titled axes; the page draws the title."""
    axis = {"zeroline": False, "showline": True, "ticks": "outside", "ticklen": 4, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hovermode": "closest",
            "hoverlabel": {"align": "left"},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "xaxis": {**axis, "title": {"text": x, "standoff": 8, "font": {"size": 13}}},
            "yaxis": {**axis, "title": {"text": y, "standoff": 8, "font": {"size": 13}}, "showgrid": True},
            **layout,
        }
    )

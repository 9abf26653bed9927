"""What several figures draw: configurations as points with their spread, dense as a line, curves as one series.

Filled marks with bars are confirmed (mean ± standard deviation over seeds); hollow, faded marks are one seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import style, words
from analysis.markup import plain
from analysis.sections import BUDGET, DENSE, Section

HOLLOW = "Filled: confirmed, mean ± standard deviation over seeds. Hollow: one seed, no claim."
LOG_SPAN = 20.0  # an axis of values that span more than this factor is logarithmic

# What the labels read. The other forty columns of a thousand rows, the configuration's text among them, would take
# a large report more than a second to turn into dicts.
POINT = (
    *words.CONFIGURATION, "stage", "total_steps", "seeds", "fid_mean", "fid_std", "params_ratio",
    "flops_inference_ratio",
)  # fmt: skip
TRIAL = (*words.CONFIGURATION, "stage", "seed", "trial_id")
DASHES = ("dot", "dashdot", "longdash")  # of dense at the second-longest budget and the shorter ones

Row = dict[str, Any]


def records_of(frame: pd.DataFrame) -> list[Row]:
    """Rows as dicts with string keys."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def keys(rows: pd.DataFrame) -> np.ndarray:
    """`customdata` of points, object [n, 3]: [method, S, p], p None where there is none."""
    found = np.array(rows[["method", "sparsity", "prune_ratio"]], dtype=object)
    found[pd.isna(found)] = None
    return found


def points(
    figure: go.Figure,
    section: Section,
    rows: pd.DataFrame,
    x: pd.Series,
    *,
    named: bool,
    hollow: bool,
    value: str = "fid",
    colour: str | None = None,
) -> None:
    """Configurations of one method at `x`, with bars of one standard deviation unless hollow. colour: None: its own."""
    if rows.empty:
        return
    method = str(rows["method"].iloc[0])
    own, symbol = style.looks(section.methods())[method]
    colour = colour or own
    stage = "one seed" if hollow else "confirmed"
    marker: dict[str, Any] = {"color": colour, "symbol": symbol, "size": 10}
    if hollow:
        marker |= {"symbol": f"{symbol}-open", "size": 8, "line": {"width": 1.5}}
    array = rows[f"{value}_std"]
    bars = None if hollow else {"type": "data", "array": array, "thickness": 1.5, "width": 4, "color": colour}
    shown = plain(method)
    figure.add_scatter(
        x=x, y=rows[f"{value}_mean"], mode="markers", error_y=bars, marker=marker,
        opacity=style.FADED if hollow else 1.0, name=shown if named and not hollow else f"{shown} ({stage})",
        legendgroup=shown, showlegend=named, customdata=keys(rows),
        text=[point_label(row, section) for row in records_of(rows[list(POINT)])],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def dense_lines(
    figure: go.Figure, section: Section, rows: pd.DataFrame, value: str = "fid", ends: tuple[float, float] = (-1, 2)
) -> None:
    """Dense's mean over the whole width at each budget of `rows`, the longest first, with a band of one standard
    deviation where it was confirmed. None at a budget that dense did not have: nothing there may be held against it."""
    budgets = sorted(rows.groupby(BUDGET), key=lambda item: item[0], reverse=True)
    for place, (_, found) in enumerate(budgets):
        dense = section.dense_of(found.iloc[0])
        if dense is None or words.missing(dense[f"{value}_mean"]):
            continue
        steps = f", {int(dense['total_steps']):,} steps" if len(budgets) > 1 else ""
        steps += f" of {int(dense['batch_size'])}" if rows["batch_size"].nunique() > 1 else ""
        confirmed = not words.missing(dense[f"{value}_std"])
        dash = DASHES[(place - 1) % len(DASHES)] if place else "solid" if confirmed else "dash"
        _dense_line(figure, f"dense{steps}", dense, value, ends, dash)


def _dense_line(figure: go.Figure, name: str, dense: Row, value: str, ends: tuple[float, float], dash: str) -> None:
    colour, mean, std = style.KNOWN[DENSE][0], dense[f"{value}_mean"], dense[f"{value}_std"]
    left, right = ends
    if not words.missing(std):
        band = {"x": [left, right, right, left], "y": [mean - std, mean - std, mean + std, mean + std]}
        fill = {"fill": "toself", "fillcolor": style.translucent(colour, 0.18), "line": {"width": 0}}
        figure.add_scatter(mode="lines", hoverinfo="skip", showlegend=False, legendgroup=name, **band, **fill)
    seeds = words.seeds(int(dense["seeds"]))
    figure.add_scatter(
        x=[left, (left * right) ** 0.5 if left > 0 else 0, right], y=[mean] * 3, mode="lines",
        name=f"{name} ({seeds})", legendgroup=name, line={"color": colour, "width": 2, "dash": dash},
        hovertemplate=f"{name}: {words.spread(mean, std)}, {seeds}<extra></extra>",
    )  # fmt: skip


def band(figure: go.Figure, x: Any, low: Any, high: Any, colour: str, group: str) -> None:
    """The ground between two curves over the same x."""
    x, low, high = (np.asarray(values, dtype=np.float64) for values in (x, low, high))
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([low, high[::-1]]), mode="lines", fill="toself",
        fillcolor=style.translucent(colour, 0.18), line={"width": 0}, hoverinfo="skip", showlegend=False,
        legendgroup=group,
    )  # fmt: skip


def point_label(row: Row, section: Section) -> str:
    """What a configuration's mark says when pointed at."""
    trained = f"{int(row['total_steps']):,} steps, {words.seeds(int(row['seeds']))}"
    return (
        f"<b>{plain(words.configuration(row))}</b><br>{plain(row['stage'])}, {trained}<br>"
        f"{plain(section.fid_name)} {words.spread(row['fid_mean'], row['fid_std'])}<br>"
        f"of dense: params {words.percent(row['params_ratio'])}, "
        f"inference FLOPs {words.percent(row['flops_inference_ratio'])}"
    )


def trial_label(row: Row) -> str:
    """What a trial's mark says when pointed at."""
    where = f"{plain(row['stage'])}, seed {row['seed']}, {plain(row['trial_id'])}"
    return f"<b>{plain(words.configuration(row))}</b><br>{where}"


def trial_labels(rows: pd.DataFrame) -> list[str]:
    """Of each row, a trial."""
    return [trial_label(row) for row in records_of(rows[list(TRIAL)])]


def broken_lines(rows: pd.DataFrame, value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All trials of `rows` as one series, a NaN between two: hundreds of series would take the browser seconds.

    Gives x (steps), y and for each position its row's place in `rows`; a gap has the place of the trial before it.
    """
    first = rows["trial_id"].ne(rows["trial_id"].shift()).to_numpy()
    gaps = np.flatnonzero(first)[1:]
    x = np.insert(rows["step"].to_numpy(np.float64), gaps, np.nan)
    y = np.insert(rows[value].to_numpy(np.float64), gaps, np.nan)
    places = np.insert(np.arange(len(rows)), gaps, gaps - 1)
    return x, y, places


def spanning(figure: go.Figure, values: pd.Series) -> go.Figure:
    """A logarithmic axis where the values span orders of magnitude, so that one bad trial does not flatten the rest."""
    low, high = float(values.min()), float(values.max())
    return figure.update_yaxes(type="log", dtick="D2") if low > 0 and high / low > LOG_SPAN else figure

"""The figures of a section; each function returns a plotly Figure, or None where there is nothing to draw yet."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import marks, style, words
from analysis.markup import plain
from analysis.sections import BUDGET, DENSE, Section

MANY_POINTS = 1500  # beyond this, curves are drawn without a mark per report
MOST_POINTS = 6_000  # beyond this, curves are thinned: a page of 100,000 points takes a browser seconds
NAMED_TRIALS = 30  # beyond this, the timeline names no trials


def fid_against_sparsity(section: Section, value: str = "fid", prune_ratio: float | None = None) -> go.Figure | None:
    """Mean of `value` ("fid" or "kid") over S per method, the dense line with its band, one-seed results hollow.

    prune_ratio: only the configurations with this p (and those of methods without one); None: all, the line joining
    the best of a method at each S, of each budget by itself.
    """
    confirmed, searched = (_with_ratio(rows, prune_ratio, value) for rows in (section.confirmed, section.searched))
    if confirmed.empty and searched.empty:
        return None
    name = section.fid_name if value == "fid" else section.kid_name
    figure = style.figure("sparsity S (share of maskable weights at zero)", plain(name))
    marks.dense_lines(figure, section, _sparse_or_all(confirmed, searched), value)
    methods = [name for name in section.methods() if name != DENSE]
    for place, method in enumerate(methods):
        shift = 0.008 * (place - (len(methods) - 1) / 2)  # so that error bars of methods stand side by side
        one = searched[searched["method"].eq(method)]
        many = confirmed[confirmed["method"].eq(method)]
        marks.points(figure, section, one, one["sparsity"] + shift, named=many.empty, hollow=True, value=value)
        colour = style.looks(section.methods())[method][0]
        for _, budget in many.groupby(BUDGET):  # no line from a trial of 500 steps to one of 40,000
            best = budget.sort_values(f"{value}_mean").drop_duplicates("sparsity").sort_values("sparsity")
            if len(best) > 1:
                line = {"color": colour, "width": 2}
                figure.add_scatter(
                    x=best["sparsity"] + shift, y=best[f"{value}_mean"], mode="lines", line=line, hoverinfo="skip",
                    showlegend=False, legendgroup=plain(method),
                )  # fmt: skip
        marks.points(figure, section, many, many["sparsity"] + shift, named=True, hollow=False, value=value)
    # Room around the marks, but no ticks where no sparsity can be.
    figure.update_xaxes(range=[-0.03, 1.0], tickvals=[0, 0.1, 0.25, 0.5, 0.75, 0.9])
    return marks.spanning(figure, pd.concat([confirmed[f"{value}_mean"], searched[f"{value}_mean"]]))


def _sparse_or_all(*frames: pd.DataFrame) -> pd.DataFrame:
    rows = pd.concat([frame for frame in frames if len(frame)])
    sparse = rows[rows["method"].ne(DENSE)]
    return sparse if len(sparse) else rows


def _with_ratio(rows: pd.DataFrame, prune_ratio: float | None, value: str) -> pd.DataFrame:
    rows = rows[rows[f"{value}_mean"].notna()]
    return rows if prune_ratio is None else rows[rows["prune_ratio"].isna() | rows["prune_ratio"].eq(prune_ratio)]


def training_curves(section: Section, value: str = "early_fid") -> go.Figure | None:
    """`value` ("early_fid" or "validation_loss") over steps, a line per trial, a cross where one was stopped or failed.

    Of more than MOST_POINTS reports every n-th is drawn, and each trial's last.
    """
    whole = section.reports[section.reports[value].notna()]
    if whole.empty:
        return None
    reports = thinned(whole)
    name = {"early_fid": plain(section.early_name), "validation_loss": "validation loss"}[value]
    figure = style.figure("optimizer step", name)
    mode = "lines+markers" if len(reports) <= MANY_POINTS else "lines"
    for method in section.methods():
        colour = style.looks(section.methods())[method][0]
        named = True
        for confirmed in (True, False):
            rows = reports[reports["method"].eq(method) & reports["stage"].eq("confirm").eq(confirmed)]
            if rows.empty:
                continue
            x, y, places = marks.broken_lines(rows, value)
            figure.add_scatter(
                x=x, y=y, text=labels(rows)[places], customdata=marks.keys(rows.iloc[places]), mode=mode,
                name=plain(method), legendgroup=plain(method), showlegend=named, marker={"size": 4},
                opacity=1.0 if confirmed else style.FADED, line={"color": colour, "width": 2 if confirmed else 1.25},
                hovertemplate="%{text}<br>step %{x:,}: %{y:.5g}<extra></extra>",
            )  # fmt: skip
            named = False
    _ends(figure, section, reports, value)
    figure.update_xaxes(range=[0, 1.02 * float(reports["step"].max())])
    return marks.spanning(figure, reports[value])


def thinned(reports: pd.DataFrame) -> pd.DataFrame:
    """Every n-th report and each trial's last, so that no more than about MOST_POINTS are left."""
    every = -(-len(reports) // MOST_POINTS)
    if every <= 1:
        return reports
    number = reports.groupby("trial_id").cumcount(ascending=False)  # 0: the last
    return reports[number.mod(every).eq(0)]


def labels(rows: pd.DataFrame) -> np.ndarray:
    """A label per row, made once per trial."""
    first = rows.drop_duplicates("trial_id")
    found = dict(zip(first["trial_id"], marks.trial_labels(first), strict=True))
    return np.array(rows["trial_id"].map(found), dtype=object)


def timeline(section: Section) -> go.Figure | None:
    """How far each search trial came: what was stopped, and when."""
    trials = section.trials[section.trials["stage"].ne("confirm")]
    trials = trials if len(trials) else section.trials
    trials = trials.assign(step=trials["step"].fillna(0)).sort_values(["step", "method", "trial_id"], ignore_index=True)
    height = max(260, 150 + 18 * len(trials)) if len(trials) <= NAMED_TRIALS else 480
    figure = style.figure("optimizer step", "", height=height)
    looks = style.looks(section.methods())
    for method in section.methods():
        rows = trials[trials["method"].eq(method)]
        if rows.empty:
            continue
        x = np.column_stack([np.zeros(len(rows)), rows["step"], np.full(len(rows), np.nan)]).ravel()
        figure.add_scatter(
            x=x, y=np.repeat(rows.index, 3), mode="lines", name=plain(method), hoverinfo="skip",
            customdata=marks.keys(rows.loc[np.repeat(rows.index, 3)]),
            line={"color": looks[method][0], "width": 6 if len(trials) <= NAMED_TRIALS else 1.5},
        )  # fmt: skip
    for state, symbol in {"STOPPED": "x", "FAILED": "cross-thin-open", "RUNNING": "circle-open"}.items():
        rows = trials[trials["state"].eq(state) & ~trials["full_budget"]]
        if rows.empty:
            continue
        marker = {"symbol": symbol, "size": 9 if len(trials) <= NAMED_TRIALS else 5, "line": {"width": 1.5}}
        figure.add_scatter(
            x=rows["step"], y=rows.index, mode="markers", name=state.lower(), marker=marker, meta="ink",
            customdata=marks.keys(rows),
            text=marks.trial_labels(rows),
            hovertemplate="%{text}<br>" + state.lower() + " at step %{x:,}<extra></extra>",
        )  # fmt: skip
    if len(trials) <= NAMED_TRIALS:
        names = [plain(words.shortened(words.configuration(row))) for row in marks.records_of(trials)]
        figure.update_yaxes(tickvals=list(trials.index), ticktext=names, showgrid=False)
    else:
        figure.update_yaxes(
            title={"text": f"{len(trials)} trials, by steps done"}, showticklabels=False, showgrid=False, ticks=""
        )
    budget = float(trials["total_steps"].max())
    return figure.update_xaxes(range=[0, budget * 1.02])


def _ends(figure: go.Figure, section: Section, reports: pd.DataFrame, value: str) -> None:
    ended = section.trials[section.trials["state"].isin(["STOPPED", "FAILED"]) & ~section.trials["full_budget"]]
    last = reports[reports["trial_id"].isin(ended["trial_id"])].drop_duplicates("trial_id", keep="last")
    if last.empty:
        return
    figure.add_scatter(
        x=last["step"], y=last[value], mode="markers", name="stopped or failed", meta="ink",
        marker={"symbol": "x", "size": 7}, customdata=marks.keys(last), text=labels(last),
        hovertemplate="%{text}<br>ended at step %{x:,}: %{y:.5g}<extra></extra>",
    )  # fmt: skip

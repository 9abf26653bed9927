"""The figures of a section; each function returns a plotly Figure, or None where there is nothing to draw yet.

Filled marks with bars are confirmed (mean ± standard deviation over seeds); hollow, faded marks are one seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import stats, style, words
from analysis.markup import plain
from analysis.sections import DENSE, Section

MANY_POINTS = 1500  # beyond this, curves are drawn without a mark per report
NAMED_TRIALS = 30  # beyond this, the timeline names no trials
LOG_SPAN = 20.0  # an FID axis that spans more than this factor is logarithmic


def fid_against_sparsity(section: Section) -> go.Figure | None:
    """Mean FID over S per method, the dense line with its band, one-seed results hollow."""
    confirmed, searched = section.confirmed, section.searched
    if confirmed.empty and searched.empty:
        return None
    figure = style.figure("sparsity S (share of maskable weights at zero)", plain(section.fid_name))
    _dense_line(figure, section)
    methods = [name for name in section.methods() if name != DENSE]
    for place, method in enumerate(methods):
        shift = 0.008 * (place - (len(methods) - 1) / 2)  # so that error bars of methods stand side by side
        one = searched[searched["method"].eq(method)]
        many = confirmed[confirmed["method"].eq(method)]
        _points(figure, section, method, one, one["sparsity"] + shift, named=many.empty, hollow=True)
        best = many.sort_values("fid_mean").drop_duplicates("sparsity").sort_values("sparsity")
        colour = style.looks(section.methods())[method][0]
        if len(best) > 1:
            line = {"x": best["sparsity"] + shift, "y": best["fid_mean"], "line": {"color": colour, "width": 2}}
            figure.add_scatter(mode="lines", hoverinfo="skip", showlegend=False, legendgroup=plain(method), **line)
        _points(figure, section, method, many, many["sparsity"] + shift, named=True, hollow=False)
    # Room around the marks, but no ticks where no sparsity can be.
    figure.update_xaxes(range=[-0.03, 1.0], tickvals=[0, 0.1, 0.25, 0.5, 0.75, 0.9])
    return _fid_axis(figure, section)


def fid_against_flops(section: Section) -> go.Figure | None:
    """FID over inference FLOPs of one sample, with the Pareto front of what the best is picked from."""
    confirmed, searched = section.confirmed, section.searched
    if confirmed.empty and searched.empty:
        return None
    figure = style.figure("inference FLOPs per sample (true convention)", plain(section.fid_name))
    front = section.ranked.reset_index(drop=True)
    front = front.iloc[stats.pareto(front["flops_inference_true"].tolist(), front["fid_mean"].tolist())]
    of = "confirmed" if len(front) and front["stage"].eq("confirm").all() else "one seed each"
    figure.add_scatter(
        x=front["flops_inference_true"], y=front["fid_mean"], mode="lines", name=f"Pareto front ({of})",
        line={"shape": "hv", "dash": "dot", "width": 2, "color": style.KNOWN[DENSE][0]}, hoverinfo="skip",
    )  # fmt: skip
    for method in section.methods():
        one = searched[searched["method"].eq(method)]
        many = confirmed[confirmed["method"].eq(method)]
        _points(figure, section, method, one, one["flops_inference_true"], named=many.empty, hollow=True)
        _points(figure, section, method, many, many["flops_inference_true"], named=True, hollow=False)
    figure.update_xaxes(tickformat="~s", rangemode="tozero")
    return _fid_axis(figure, section)


def training_curves(section: Section, value: str = "fid") -> go.Figure | None:
    """`value` ("fid" or "validation_loss") over steps, a line per trial, a cross where one was stopped or failed."""
    reports = section.reports[section.reports[value].notna()]
    if reports.empty:
        return None
    name = {"fid": plain(section.fid_name), "validation_loss": "validation loss"}[value]
    figure = style.figure("optimizer step", name)
    mode = "lines+markers" if len(reports) <= MANY_POINTS else "lines"
    for method in section.methods():
        colour = style.looks(section.methods())[method][0]
        named = True
        for confirmed in (True, False):
            rows = reports[reports["method"].eq(method) & reports["stage"].eq("confirm").eq(confirmed)]
            if rows.empty:
                continue
            x, y, label = _broken_lines(rows, value)
            figure.add_scatter(
                x=x, y=y, text=label, mode=mode, name=plain(method), legendgroup=plain(method), showlegend=named,
                opacity=1.0 if confirmed else style.FADED, marker={"size": 4},
                line={"color": colour, "width": 2 if confirmed else 1.25},
                hovertemplate="%{text}<br>step %{x:,}: %{y:.5g}<extra></extra>",
            )  # fmt: skip
            named = False
    _ends(figure, section, reports, value)
    figure.update_xaxes(range=[0, 1.02 * float(reports["step"].max())])
    return _spanning(figure, reports[value])


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
            line={"color": looks[method][0], "width": 6 if len(trials) <= NAMED_TRIALS else 1.5},
        )  # fmt: skip
    for state, symbol in {"STOPPED": "x", "FAILED": "cross-thin-open", "RUNNING": "circle-open"}.items():
        rows = trials[trials["state"].eq(state) & ~trials["full_budget"]]
        if rows.empty:
            continue
        marker = {"symbol": symbol, "size": 9 if len(trials) <= NAMED_TRIALS else 5, "line": {"width": 1.5}}
        figure.add_scatter(
            x=rows["step"], y=rows.index, mode="markers", name=state.lower(), marker=marker, meta="ink",
            text=[_trial_label(row) for row in rows.to_dict("records")],
            hovertemplate="%{text}<br>" + state.lower() + " at step %{x:,}<extra></extra>",
        )  # fmt: skip
    if len(trials) <= NAMED_TRIALS:
        names = [plain(words.configuration(row)) for row in trials.to_dict("records")]
        figure.update_yaxes(tickvals=list(trials.index), ticktext=names, showgrid=False)
    else:
        figure.update_yaxes(
            title={"text": f"{len(trials)} trials, by steps done"}, showticklabels=False, showgrid=False, ticks=""
        )
    budget = float(trials["total_steps"].max())
    return figure.update_xaxes(range=[0, budget * 1.02])


def _dense_line(figure: go.Figure, section: Section) -> None:
    """The dense FID over the whole width, with a band of one standard deviation where it was confirmed."""
    dense = section.dense
    if dense is None:
        return
    colour, mean, std = style.KNOWN[DENSE][0], dense["fid_mean"], dense["fid_std"]
    confirmed = not words.missing(std)
    if confirmed:
        band = {"x": [-1, 2, 2, -1], "y": [mean - std, mean - std, mean + std, mean + std]}
        fill = {"fill": "toself", "fillcolor": style.translucent(colour, 0.18), "line": {"width": 0}}
        figure.add_scatter(mode="lines", hoverinfo="skip", showlegend=False, legendgroup=DENSE, **band, **fill)
    seeds = words.seeds(int(dense["seeds"]))
    figure.add_scatter(
        x=[-1, 0, 2], y=[mean] * 3, mode="lines", name=f"dense ({seeds})", legendgroup=DENSE,
        line={"color": colour, "width": 2, "dash": "solid" if confirmed else "dash"},
        hovertemplate=f"dense: {words.spread(mean, std)}, {seeds}<extra></extra>",
    )  # fmt: skip


def _points(
    figure: go.Figure, section: Section, method: str, rows: pd.DataFrame, x: pd.Series, named: bool, hollow: bool
) -> None:
    if rows.empty:
        return
    colour, symbol = style.looks(section.methods())[method]
    stage = "one seed" if hollow else "confirmed"
    marker: dict[str, Any] = {"color": colour, "symbol": symbol, "size": 10}
    if hollow:
        marker |= {"symbol": f"{symbol}-open", "size": 8, "line": {"width": 1.5}}
    bars = None if hollow else {"type": "data", "array": rows["fid_std"], "thickness": 1.5, "width": 4, "color": colour}
    figure.add_scatter(
        x=x, y=rows["fid_mean"], mode="markers", error_y=bars, marker=marker, opacity=style.FADED if hollow else 1.0,
        name=plain(method) if named and not hollow else f"{plain(method)} ({stage})",
        legendgroup=plain(method), showlegend=named,
        text=[_point_label(row, section.fid_name) for row in rows.to_dict("records")],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _point_label(row: dict[str, Any], fid_name: str) -> str:
    seeds = words.seeds(int(row["seeds"]))
    return (
        f"<b>{plain(words.configuration(row))}</b><br>{plain(row['stage'])}, {seeds}<br>"
        f"{plain(fid_name)} {words.spread(row['fid_mean'], row['fid_std'])}<br>"
        f"of dense: params {words.percent(row['params_ratio'])}, "
        f"inference FLOPs {words.percent(row['flops_inference_ratio'])}"
    )


def _trial_label(row: dict[str, Any]) -> str:
    where = f"{plain(row['stage'])}, seed {row['seed']}, {plain(row['trial_id'])}"
    return f"<b>{plain(words.configuration(row))}</b><br>{where}"


def _broken_lines(rows: pd.DataFrame, value: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All trials of `rows` as one series, a NaN between two: hundreds of series would take the browser seconds."""
    first = rows["trial_id"].ne(rows["trial_id"].shift()).to_numpy()
    gaps = np.flatnonzero(first)[1:]
    x = np.insert(rows["step"].to_numpy(np.float64), gaps, np.nan)
    y = np.insert(rows[value].to_numpy(np.float64), gaps, np.nan)
    lengths = np.diff([*np.flatnonzero(first), len(rows)])
    lengths[:-1] += 1  # the gap belongs to the trial before it
    labels = [_trial_label(row) for row in rows[first].to_dict("records")]
    return x, y, [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)]


def _ends(figure: go.Figure, section: Section, reports: pd.DataFrame, value: str) -> None:
    ended = section.trials[section.trials["state"].isin(["STOPPED", "FAILED"]) & ~section.trials["full_budget"]]
    last = reports[reports["trial_id"].isin(ended["trial_id"])].drop_duplicates("trial_id", keep="last")
    if last.empty:
        return
    figure.add_scatter(
        x=last["step"], y=last[value], mode="markers", name="stopped or failed", meta="ink",
        marker={"symbol": "x", "size": 7}, text=[_trial_label(row) for row in last.to_dict("records")],
        hovertemplate="%{text}<br>ended at step %{x:,}: %{y:.5g}<extra></extra>",
    )  # fmt: skip


def _fid_axis(figure: go.Figure, section: Section) -> go.Figure:
    return _spanning(figure, pd.concat([section.confirmed["fid_mean"], section.searched["fid_mean"]]))


def _spanning(figure: go.Figure, values: pd.Series) -> go.Figure:
    """A logarithmic axis where the values span orders of magnitude, so that one bad trial does not flatten the rest."""
    low, high = float(values.min()), float(values.max())
    return figure.update_yaxes(type="log", dtick="D2") if low > 0 and high / low > LOG_SPAN else figure

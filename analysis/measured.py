"""Counted FLOPs beside measured seconds, so that nobody takes one for the other."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analysis import marks, style, words
from analysis.parts import Part
from analysis.sections import DENSE, Section


def parts(section: Section) -> list[Part]:
    """Ratio of training seconds over ratio of training FLOPs, both to dense."""
    drawn = figure(section)
    if drawn is None:
        return []
    caption = (
        "A mark on the dashed line would train in as few seconds as its FLOPs say; on the level line at 1 it takes as "
        "long as dense. Seconds per step of the same batch and workers; masked weights are stored dense, and other "
        "trials ran on the same machine."
    )
    return [Part("flops_and_seconds", "Counted FLOPs and measured seconds", drawn, caption, (_words(section),))]


def figure(section: Section) -> go.Figure | None:
    """Measured seconds a step over counted FLOPs, both as ratios to dense; sparse configurations only."""
    confirmed, searched = (_known(rows) for rows in (section.confirmed, section.searched))
    if confirmed.empty and searched.empty:
        return None
    drawn = style.figure("training FLOPs, times dense (counted)", "seconds per step, times dense (measured)")
    grey = style.KNOWN[DENSE][0]
    for name, y, dash in (("seconds would follow FLOPs", [0, 1], "dash"), ("as slow as dense", [1, 1], "dot")):
        drawn.add_scatter(x=[0, 1], y=y, mode="lines", name=name, line={"color": grey, "width": 1.5, "dash": dash},
                          hoverinfo="skip")  # fmt: skip
    for method in [name for name in section.methods() if name != DENSE]:
        for rows, hollow in ((searched, True), (confirmed, False)):
            mine = rows[rows["method"].eq(method)]
            named = not hollow or confirmed[confirmed["method"].eq(method)].empty
            marks.points(drawn, section, mine, mine["flops_train_ratio"], named=named, hollow=hollow, value="ratio")
    return drawn.update_xaxes(range=[0, 1.05]).update_yaxes(rangemode="tozero")


def _known(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.assign(ratio_mean=rows["train_s_ratio"], ratio_std=float("nan"))
    return rows[rows["method"].ne(DENSE) & rows["ratio_mean"].notna() & rows["flops_train_ratio"].notna()]


def _words(section: Section) -> str:
    best = section.best
    if best is None or words.missing(best["train_s_ratio"]):
        return "FLOPs are counted from shapes and densities; seconds are measured."
    return (
        f"{words.configuration(best)}: {words.percent(best['flops_train_ratio'])} of dense's training FLOPs by count, "
        f"{words.percent(best['train_s_ratio'])} of its seconds per step by the clock."
    )

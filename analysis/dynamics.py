"""FID during training, mean and spread over seeds, over steps, FLOPs and seconds (the sparse paper's Figures 4 and 5).

A sparse step costs fewer FLOPs than a dense one, so that what looks slower over steps can be ahead over FLOPs; seconds
are what was paid where the sweep ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from analysis import marks, style, words
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import DENSE, Section
from analysis.tables import Column, Table

PAPERS_SPARSITY = 0.25  # of Figures 4 and 5


@dataclass(frozen=True)
class Axis:
    """What a curve is drawn over: a column of reports."""

    name: str
    column: str
    title: str  # in "FID over <title>"
    axis: str


AXES = (
    Axis("dynamics", "step", "steps", "optimizer step"),
    Axis("dynamics_flops", "flops_spent_true", "training FLOPs", "training FLOPs spent (true convention)"),
    Axis("dynamics_seconds", "train_s", "seconds", "measured seconds in training steps"),
)


def parts(section: Section) -> list[Part]:
    """Curves of dense and each method's best over three axes, and of all methods at one S."""
    best = best_of_each(section)
    points = curves(section, best)
    if points.empty:
        return []
    who = "Dense and the best configuration of each method"
    if section.ranked["total_steps"].nunique() > 1 and section.best:
        who += f" at {section.best['total_steps']:,} steps"
    band = "mean over seeds, band one standard deviation" if points["seeds"].gt(1).any() else "one seed each, no claim"
    found = [
        Part(axis.name, f"{section.early_name} during training, over {axis.title}", figure(section, points, axis),
             f"{who}: {band}. {_reading(axis)}")
        for axis in AXES
    ]  # fmt: skip
    found.append(Part("dynamics_table", "Training dynamics in numbers", tables=(table(section, points),), folded=True))
    sparsity = common_sparsity(section)
    if sparsity is not None:
        rows = section.comparable
        same = rows[rows["sparsity"].eq(sparsity) | rows["method"].eq(DENSE)]
        same = same.sort_values("fid_mean", kind="stable").drop_duplicates("method")
        if set(same["configuration"]) != set(best["configuration"]):
            title = f"{section.early_name} during training at S = {words.plain_number(sparsity)}"
            caption = f"Dense and the best configuration of each method at this sparsity: {band}."
            found.append(Part("dynamics_one_s", title, figure(section, curves(section, same), AXES[0]), caption))
    return found


def best_of_each(section: Section) -> pd.DataFrame:
    """The configuration with the lowest mean of each method, as `comparable` has them, and dense of whatever stage."""
    rows, best = section.comparable, section.best
    dense = section.dense if best is None else section.dense_of(best)
    if dense is not None and not rows["method"].eq(DENSE).any():
        rows = pd.concat([frame for frame in (rows, pd.DataFrame([dense])) if len(frame)], ignore_index=True)
    return rows.sort_values("fid_mean", kind="stable").drop_duplicates("method")


def common_sparsity(section: Section) -> float | None:
    """The S at which most sparse methods have a result, two at least; of several the one nearest the papers' .25."""
    rows = section.comparable[section.comparable["method"].ne(DENSE)]
    counts = rows.groupby("sparsity")["method"].nunique()
    counts = counts[counts.ge(2) & counts.eq(counts.max())]
    return None if counts.empty else float(min(counts.index, key=lambda s: (abs(s - PAPERS_SPARSITY), s)))


def curves(section: Section, configurations: pd.DataFrame) -> pd.DataFrame:
    """A row per configuration and step: fid_mean, fid_std (of early_fid), seeds, the means of the other axes' columns.

    Only the trials that stand behind the configurations (their stage, at full budget), and only steps that all of them
    reported: a mean over fewer seeds would jump.
    """
    found = []
    for row in marks.records_of(configurations):
        trials = section.trials
        mine = trials["configuration"].eq(row["configuration"]) & trials["stage"].eq(row["stage"])
        mine &= trials["full_budget"]
        if row["trial_id"] is not None and not words.missing(row["trial_id"]):
            mine &= trials["trial_id"].eq(row["trial_id"])
        chosen = trials[mine].drop_duplicates("seed", keep="last")["trial_id"]
        reports = section.reports[section.reports["trial_id"].isin(chosen) & section.reports["early_fid"].notna()]
        by_step = reports.groupby("step").agg(
            fid_mean=("early_fid", "mean"), fid_std=("early_fid", "std"), seeds=("early_fid", "count"),
            flops_spent_true=("flops_spent_true", "mean"), train_s=("train_s", "mean"),
        )  # fmt: skip
        by_step = by_step[by_step["seeds"].eq(len(chosen))].reset_index()
        facts = [
            "method",
            "sparsity",
            "prune_ratio",
            "update_interval_steps",
            "other_settings",
            "configuration",
            "stage",
        ]
        found.append(by_step.assign(**{name: row[name] for name in facts}))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def figure(section: Section, points: pd.DataFrame, axis: Axis) -> go.Figure | None:
    """A curve per configuration of `points` (see `curves`) over one axis."""
    if points.empty:
        return None
    drawn = style.figure(axis.axis, plain(section.early_name))
    looks = style.looks(section.methods())
    for (method, _), rows in points.groupby(["method", "configuration"], sort=False, dropna=False):
        colour, symbol = looks[method]
        row = marks.records_of(rows)[0]
        name = plain(words.configuration(row))
        if rows["fid_std"].notna().all():
            low, high = rows["fid_mean"] - rows["fid_std"], rows["fid_mean"] + rows["fid_std"]
            marks.band(drawn, rows[axis.column], low, high, colour, name)
        drawn.add_scatter(
            x=rows[axis.column], y=rows["fid_mean"], mode="lines+markers", name=name, legendgroup=name,
            line={"color": colour, "width": 2}, marker={"symbol": symbol, "size": 6}, customdata=marks.keys(rows),
            text=[f"<b>{name}</b><br>step {step:,}: {words.spread(mean, std)}" for step, mean, std in
                  zip(rows["step"], rows["fid_mean"], rows["fid_std"], strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    drawn.update_xaxes(rangemode="tozero", tickformat="~s")
    return marks.spanning(drawn, points["fid_mean"])


def table(section: Section, points: pd.DataFrame) -> Table:
    """The points of the curves."""
    columns = (
        Column("configuration", words.configuration, numeric=False),
        Column("step", lambda row: words.integer(row["step"])),
        Column("train FLOPs", lambda row: words.scientific(row["flops_spent_true"])),
        Column("train time", lambda row: words.duration(row["train_s"])),
        Column("seeds", lambda row: str(row["seeds"])),
        Column(section.early_name, lambda row: words.spread(row["fid_mean"], row["fid_std"])),
    )
    frame = points.assign(model=section.model, dataset=section.dataset, protocol=section.early_text)
    caption = "Mean ± standard deviation over seeds at each report that all seeds have."
    return Table("dynamics", "Training dynamics in numbers", caption, frame, columns)


def _reading(axis: Axis) -> str:
    return {
        "dynamics": "A step is the same number of examples for all.",
        "dynamics_flops": "Left is cheaper: the same steps cost a sparse model fewer FLOPs.",
        "dynamics_seconds": "Seconds of training steps on the machine that ran the sweep, evaluation left out.",
    }[axis.name]

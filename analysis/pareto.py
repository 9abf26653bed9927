"""Which configurations no other one beats in both FID and cost, for each kind of cost, and how sure that is.

The band around a front is a percentile bootstrap over seeds (DRAWS resamples with a fixed seed): in each resample every
confirmed configuration's mean is taken anew from its own seeds, drawn with replacement, and the lowest mean at that
cost or less is kept. With three seeds such a band is too narrow (it covers 81 % where it says 95 %, see stats.py): it
shows which part of a front is loose, and claims nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import marks, stats, style, words
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import CONFIDENCE, DENSE, Section
from analysis.tables import Column, Row, Table

DRAWS = 2000
GREY = "#8d96a0"


@dataclass(frozen=True)
class Cost:
    """A column of `Section.configurations` that one wants small."""

    name: str
    column: str
    title: str  # in "FID against <title>"
    axis: str


COSTS = (
    Cost("flops", "flops_inference_true", "inference FLOPs", "inference FLOPs per sample (true convention)"),
    Cost("flops_train", "flops_train_true", "training FLOPs", "training FLOPs of the full budget (true convention)"),
    Cost("params", "params_active", "parameters", "active parameters"),
    Cost("seconds", "train_s", "measured seconds", "measured seconds of training"),
)


def parts(section: Section) -> list[Part]:
    """A front per kind of cost, and the table of who is on which."""
    if section.ranked.empty:
        return []
    found = [Part(cost.name, f"{section.fid_name} against {cost.title}", figure(section, cost), _caption(section, cost))
             for cost in COSTS]  # fmt: skip
    return [*found, Part("pareto", "On which front", tables=(table(section),))]


def figure(section: Section, cost: Cost) -> go.Figure | None:
    """FID over a cost: the front with its band, dominated configurations grey, stopped trials as crosses."""
    confirmed, searched = (rows[rows[cost.column].notna()] for rows in (section.confirmed, section.searched))
    if confirmed.empty and searched.empty:
        return None
    drawn = style.figure(cost.axis, plain(section.fid_name))
    ranked = candidates(section, cost)
    front = ranked[on_front(ranked, cost)].sort_values(cost.column)
    _band(drawn, ranked, cost)
    sure = front["stage"].eq("confirm")
    of = "one seed each" if not sure.any() else "confirmed" if sure.all() else "confirmed, or one seed"
    drawn.add_scatter(
        x=front[cost.column], y=front["fid_mean"], mode="lines", name=f"Pareto front ({of})",
        line={"shape": "hv", "dash": "dot", "width": 2, "color": style.KNOWN[DENSE][0]}, hoverinfo="skip",
    )  # fmt: skip
    kept = set(front["configuration"] + front["stage"] + front["trial_id"].fillna("").astype(str))
    for method in section.methods():
        named = False
        for rows, hollow in ((confirmed, False), (searched, True)):
            mine = rows[rows["method"].eq(method)]
            best = (mine["configuration"] + mine["stage"] + mine["trial_id"].fillna("").astype(str)).isin(kept)
            for chosen, colour in ((mine[best], None), (mine[~best], GREY)):
                marks.points(drawn, section, chosen, chosen[cost.column], named=not named, hollow=hollow, colour=colour)
                named = named or len(chosen) > 0
    _stopped(drawn, section, cost)
    drawn.update_xaxes(tickformat="~s", rangemode="tozero")
    values = [confirmed["fid_mean"], searched["fid_mean"], _stopped_trials(section)["fid"]]
    return marks.spanning(drawn, pd.concat(values))


def candidates(section: Section, cost: Cost) -> pd.DataFrame:
    """What a front is made of: the confirmed configurations, or the search's where no sparse one is confirmed."""
    rows = section.ranked
    return rows[rows[cost.column].notna() & rows["fid_mean"].notna()].reset_index(drop=True)


def on_front(rows: pd.DataFrame, cost: Cost) -> pd.Series:
    """Whether no other row has both less cost and a lower mean FID."""
    front = stats.pareto(rows[cost.column].tolist(), rows["fid_mean"].tolist())
    return rows.index.to_series().isin(rows.index[front])


def bootstrap(rows: pd.DataFrame, cost: Cost) -> pd.DataFrame:
    """The front's band: `cost` ascending, `low` and `high` of the lowest mean FID at that cost or less.

    Rows with one seed stay where they are. Seeded: the same rows give the same band.
    """
    rows = rows.sort_values([cost.column, "fid_mean"], kind="stable")
    draws = np.random.default_rng(0)
    means = np.empty((DRAWS, len(rows)))
    for place, values in enumerate(rows["fid_values"]):
        seeds = np.asarray(values, dtype=np.float64)
        means[:, place] = seeds[draws.integers(0, len(seeds), (DRAWS, len(seeds)))].mean(1)
    lowest = np.minimum.accumulate(means, axis=1)
    low, high = np.quantile(lowest, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    found = pd.DataFrame({"cost": rows[cost.column].to_numpy(), "low": low, "high": high})
    return found.drop_duplicates("cost", keep="last", ignore_index=True)


def table(section: Section) -> Table:
    """Every candidate and the fronts it is on."""
    rows = section.ranked.copy()
    for cost in COSTS:
        known = candidates(section, cost)
        front = set(known[on_front(known, cost)]["configuration"] + known["trial_id"].fillna("").astype(str))
        rows[f"front_{cost.name}"] = (rows["configuration"] + rows["trial_id"].fillna("").astype(str)).isin(front)
    fronts = [f"front_{cost.name}" for cost in COSTS]
    rows = rows[rows[fronts].any(axis=1)].sort_values(["flops_inference_true", "fid_mean"], kind="stable")
    columns = (
        Column("configuration", lambda row: words.configuration(row), numeric=False),
        Column("seeds", lambda row: str(row["seeds"])),
        Column(section.fid_name, lambda row: words.spread(row["fid_mean"], row["fid_std"])),
        *(Column(cost.title, partial(_mark, cost=cost), numeric=False) for cost in COSTS),
    )
    keep = [
        "method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings", "configuration", "trial_id",
        "stage", "seeds", "fid_mean", "fid_std", *(cost.column for cost in COSTS), *fronts,
        "model", "dataset", "protocol",
    ]  # fmt: skip
    caption = "Configurations that no other one beats in both mean FID and the cost of a column. A front of means is "
    caption += "itself noisy: see the bands." if rows["seeds"].gt(1).any() else "noisy: these are of one seed each."
    return Table("pareto", "On which front", caption, rows[keep], columns, "No configuration has a result yet.")


def _mark(row: Row, cost: Cost) -> str:
    return "front" if row[f"front_{cost.name}"] else ""


def _caption(section: Section, cost: Cost) -> str:
    text = f"{marks.HOLLOW} No configuration beats one on the dotted front in both; beaten ones are grey "
    text += "(dense always is). "
    if candidates(section, cost)["seeds"].gt(1).any():
        text += f"Band: {words.percent(CONFIDENCE)} of {DRAWS:,} bootstraps over seeds, too narrow with few seeds. "
    if not _stopped_trials(section).empty:
        text += "Crosses: last value of trials stopped early, no results. "
    what = {
        "flops": "FLOPs are counted for all DDIM steps.",
        "flops_train": "FLOPs are counted for the full budget.",
        "params": "Active parameters; masked weights are stored dense.",
        "seconds": "Seconds were measured where the sweep ran, with what else ran there: they are no FLOPs.",
    }
    return text + what[cost.name]


def _band(drawn: go.Figure, rows: pd.DataFrame, cost: Cost) -> None:
    if not rows["seeds"].gt(1).any() or len(rows) < 2:
        return
    found = bootstrap(rows, cost)
    # As the front: flat until the next cost, then down.
    x = np.repeat(found["cost"].to_numpy(), 2)[1:]
    low, high = (np.repeat(found[end].to_numpy(), 2)[:-1] for end in ("low", "high"))
    marks.band(drawn, x, low, high, style.KNOWN[DENSE][0], "band")


def _stopped_trials(section: Section) -> pd.DataFrame:
    trials = section.trials
    return trials[trials["state"].eq("STOPPED") & ~trials["full_budget"] & trials["fid"].notna()]


def _stopped(drawn: go.Figure, section: Section, cost: Cost) -> None:
    rows = _stopped_trials(section)
    rows = rows[rows[cost.column].notna()]
    if rows.empty:
        return
    spent = {"flops_train_true": "flops_spent_true"}.get(cost.column, cost.column)  # what it cost until then
    drawn.add_scatter(
        x=rows[spent], y=rows["fid"], mode="markers", name="stopped early", meta="ink", opacity=0.5,
        marker={"symbol": "x-thin-open", "size": 6}, customdata=marks.keys(rows),
        text=[f"{label}<br>stopped at step {step:,.0f}: no result"
              for label, step in zip(marks.trial_labels(rows), rows["step"], strict=True)],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip

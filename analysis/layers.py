"""Where the weights are and how the topology moved: density per layer, connections replaced, masks across seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from analysis import figures, marks, style, words
from analysis.load import column
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import DENSE, Section
from analysis.tables import Column, Table
from raysparse.errors import UsageError

MOST_NAMED = 60  # layers; more get no names on the axis


def parts(section: Section) -> list[Part]:
    """Densities of each method's best, and the share of connections replaced over training."""
    found = []
    rows = densities(section)
    if len(rows):
        caption = "Last report of one seed of each method's best configuration, layers in the order of the model."
        found.append(Part("layers", "Density per layer", figure(section, rows), caption,
                          tables=(table(section, rows),), folded=True))  # fmt: skip
    moved = topology(section)
    if moved is not None:
        caption = (
            "Share of active connections replaced since the report before, a line per trial, confirmed ones stronger. "
            "A static topology stays at 0; p sets how much a dynamic one may move."
        )
        found.append(Part("topology", "How the topology moved", moved, caption))
    return found


def densities(section: Section) -> pd.DataFrame:
    """A row per layer and method: the density in the last report of one trial of the method's best configuration."""
    found = []
    best = section.ranked.sort_values("fid_mean", kind="stable").drop_duplicates("method")
    for row in marks.records_of(best):
        if row["method"] == DENSE:
            continue
        trials = section.trials[section.trials["configuration"].eq(row["configuration"])]
        trials = trials[trials["stage"].eq(row["stage"]) & trials["full_budget"]].sort_values("seed", kind="stable")
        layers = _layers(str(trials["path"].iloc[0]))
        keep = {name: row[name] for name in ("method", "sparsity", "prune_ratio", "configuration")}
        found += [
            keep | {"seed": int(trials["seed"].iloc[0]), "layer": name, "density": d} for name, d in layers.items()
        ]
    return pd.DataFrame(found).assign(model=section.model, dataset=section.dataset) if found else pd.DataFrame()


def figure(section: Section, rows: pd.DataFrame) -> go.Figure:
    """Density over the layers, a line with marks per method."""
    names = list(dict.fromkeys(rows["layer"]))
    drawn = style.figure("density (share of a layer's weights that are active)", "",
                         height=max(260, 120 + 20 * len(names)) if len(names) <= MOST_NAMED else 520)  # fmt: skip
    looks = style.looks(section.methods())
    place = {name: number for number, name in enumerate(names)}
    for method, points in rows.groupby("method", sort=False):
        colour, symbol = looks[method]
        first = marks.records_of(points)[0]
        name = plain(f"{method}, S = {words.plain_number(first['sparsity'])}")
        drawn.add_scatter(
            x=points["density"], y=points["layer"].map(place), mode="markers", name=name, customdata=marks.keys(points),
            marker={"color": colour, "symbol": symbol, "size": 8},
            text=[plain(layer) for layer in points["layer"]], hovertemplate="%{text}: %{x:.4f}<extra></extra>",
        )  # fmt: skip
    drawn.update_xaxes(range=[-0.02, 1.04])
    if len(names) <= MOST_NAMED:
        drawn.update_yaxes(
            tickvals=list(place.values()), ticktext=[plain(name) for name in names], autorange="reversed"
        )
    else:
        drawn.update_yaxes(
            title={"text": f"{len(names)} layers, first on top"}, autorange="reversed", showticklabels=False
        )
    return drawn


def table(section: Section, rows: pd.DataFrame) -> Table:
    """The densities."""
    columns = (
        Column("layer", lambda row: words.text(row["layer"]), numeric=False),
        Column("method", lambda row: words.text(row["method"]), numeric=False),
        Column("S", lambda row: words.plain_number(row["sparsity"])),
        Column("density", lambda row: f"{row['density']:.4f}"),
    )
    caption = "Active weights over all weights of a layer. Norms, biases and embeddings are dense and not listed."
    return Table("layers", "Density per layer", caption, rows, columns)


def topology(section: Section) -> go.Figure | None:
    """Share of active connections replaced between two reports, over steps; sparse trials with updates only."""
    reports = section.reports[section.reports["method"].ne(DENSE) & section.reports["topology_changed"].notna()]
    moving = reports.groupby("trial_id")["topology_updates"].transform("max").gt(0) if len(reports) else None
    if moving is None or not moving.any():
        return None
    reports = figures.thinned(reports[moving])
    drawn = style.figure("optimizer step", "share of connections replaced since the last report")
    looks = style.looks(section.methods())
    for method in [name for name in section.methods() if name in set(reports["method"])]:
        for confirmed in (True, False):
            rows = reports[reports["method"].eq(method) & reports["stage"].eq("confirm").eq(confirmed)]
            if rows.empty:
                continue
            x, y, places = marks.broken_lines(rows, "topology_changed")
            drawn.add_scatter(
                x=x, y=y, mode="lines", name=plain(method) + ("" if confirmed else " (search)"),
                legendgroup=plain(method), opacity=1.0 if confirmed else style.FADED,
                line={"color": looks[method][0], "width": 2 if confirmed else 1}, text=figures.labels(rows)[places],
                customdata=marks.keys(rows.iloc[places]),
                hovertemplate="%{text}<br>step %{x:,}: %{y:.1%}<extra></extra>",
            )  # fmt: skip
    drawn.update_xaxes(rangemode="tozero")
    return drawn.update_yaxes(tickformat=".0%", rangemode="tozero")


def _layers(path: str) -> dict[str, float]:
    """layer -> density of a record's last report; nothing where the record cannot be read (any more)."""
    try:
        texts = [text for text in column(Path(path), "layer_density") if text]
        found = json.loads(texts[-1]) if texts else {}
    except (UsageError, ValueError):
        return {}
    return (
        {str(name): float(d) for name, d in found.items() if isinstance(d, int | float)}
        if isinstance(found, dict)
        else {}
    )

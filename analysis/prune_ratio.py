"""FID against the prune ratio p (the sparse paper's Figure 8), static against dynamic at high S (Tables 9 and 10)."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analysis import marks, stats, style, words
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import BUDGET, CONFIDENCE, DENSE, Section
from analysis.tables import Column, Table

PAPERS_SPARSITY = 0.9  # of Tables 9 and 10
STATIC = "static"  # others have no p either (timesteps, nm_ste), and are not what these tables call static
MOST_LINES = 10  # configurations over p that get a line; a search's scattered p do not make one


def parts(section: Section) -> list[Part]:
    """The figure where a method was run with two p or more, and the table where one S has static beside that."""
    rows = _dynamic(section)
    if rows["prune_ratio"].nunique() < 2:
        return []
    caption = (
        f"{marks.HOLLOW} Marks differ in S and ΔTe too where these vary; lines join the best at each p of a method and "
        "S. The level line is dense of the same budget."
    )
    found = [Part("prune_ratio", f"{section.fid_name} against the prune ratio p", figure(section), caption)]
    contrast = table(section)
    return found if contrast is None else [*found, Part("static_dynamic", contrast.title, tables=(contrast,))]


def figure(section: Section) -> go.Figure | None:
    """FID over p (logarithmic), dynamic methods only."""
    rows = _dynamic(section)
    if rows.empty:
        return None
    drawn = style.figure("prune ratio p (share of active weights replaced per update)", plain(section.fid_name))
    low, high = float(rows["prune_ratio"].min()), float(rows["prune_ratio"].max())
    marks.dense_lines(drawn, section, rows, ends=(low / 1.3, high * 1.3))
    confirmed = rows["stage"].eq("confirm")
    lines = rows[confirmed].groupby(["method", "sparsity", *BUDGET])  # no line from one budget to another
    for (method, sparsity, *_), group in sorted(lines, key=lambda item: -len(item[1]))[:MOST_LINES]:
        best = group.sort_values("fid_mean", kind="stable").drop_duplicates("prune_ratio").sort_values("prune_ratio")
        if len(best) > 1:
            colour = style.looks(section.methods())[method][0]
            name = plain(f"{method}, S = {words.plain_number(sparsity)}")
            drawn.add_scatter(
                x=best["prune_ratio"], y=best["fid_mean"], mode="lines", line={"color": colour, "width": 1.5},
                name=name, showlegend=False, legendgroup=plain(method), hoverinfo="skip", customdata=marks.keys(best),
            )  # fmt: skip
    for method in sorted(rows["method"].unique()):
        one, many = (rows[rows["method"].eq(method) & mask] for mask in (~confirmed, confirmed))
        marks.points(drawn, section, one, one["prune_ratio"], named=many.empty, hollow=True)
        marks.points(drawn, section, many, many["prune_ratio"], named=True, hollow=False)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0) if low / 1.3 <= tick <= high * 1.3]
    drawn.update_xaxes(type="log", tickvals=ticks or [low], ticktext=[words.plain_number(t) for t in ticks or [low]])
    return marks.spanning(drawn, rows["fid_mean"])


def table(section: Section) -> Table | None:
    """Static and each (dynamic method, p) at one S and budget, each held against static; None where none has both.

    The S is .9 where it has static and two p of a dynamic method, else the largest that has; of budgets the longest.
    """
    confirmed = _contrast(section.confirmed)
    rows = _contrast(section.searched) if confirmed is None else confirmed
    if rows is None:
        return None
    # The lowest of several is picked by the seeds that then judge it, so that all pairs count: of equals, 12 in 100
    # tables claimed a difference where each p stood for twelve ΔTe (ten seeds), and 2 if all are counted.
    judged = rows[rows["seeds"].gt(1)]["method"].eq(STATIC)
    confidence = stats.simultaneous(CONFIDENCE, int(judged.sum()) * int((~judged).sum()))
    rows = rows.sort_values("fid_mean", kind="stable").drop_duplicates(["method", "prune_ratio"])
    rows = rows.sort_values(["method", "prune_ratio"], ascending=[True, False], kind="stable")
    fixed = rows["method"].eq(STATIC)
    static = rows[fixed].sort_values("fid_mean", kind="stable").iloc[0]
    rows = pd.concat([rows[fixed], rows[~fixed]], ignore_index=True)
    gaps = [stats.welch(values, static["fid_values"], confidence) for values in rows["fid_values"]]
    moving = rows["prune_ratio"].notna()
    rows = rows.assign(
        static_difference=pd.Series([gap.estimate for gap in gaps]).where(moving),
        static_difference_low=pd.Series([gap.low for gap in gaps]).where(moving),
        static_difference_high=pd.Series([gap.high for gap in gaps]).where(moving),
        static_verdict=pd.Series([gap.verdict for gap in gaps], dtype=object).where(moving, None),
    )
    columns = (
        Column("method", lambda row: words.text(row["method"]), numeric=False),
        Column("p", lambda row: words.plain_number(row["prune_ratio"])),
        Column("ΔTe", lambda row: words.integer(row["update_interval_steps"])),
        Column("seeds", lambda row: str(row["seeds"])),
        Column(section.fid_name, lambda row: words.spread(row["fid_mean"], row["fid_std"]),
               bold=lambda row: not words.missing(row["prune_ratio"]) and row["fid_mean"] < static["fid_mean"]),
        Column("minus static", lambda row: words.interval(row, "static_difference", row["fid_mean"])),
        Column("verdict", lambda row: words.text(row["static_verdict"]), numeric=False),
    )  # fmt: skip
    keep = [
        "method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings", "configuration", "stage",
        "seeds", "fid_mean", "fid_std", "static_difference", "static_difference_low", "static_difference_high",
        "static_verdict", "model", "dataset", "protocol",
    ]  # fmt: skip
    title = f"Static against dynamic at S = {words.plain_number(static['sparsity'])}"
    caption = (
        f"Bold: a lower mean than static. In brackets: Welch intervals at {words.percent(CONFIDENCE)} for all rows "
        "together. The lowest of several ΔTe stands for a p, and those it was picked from count as rows; one seed has "
        "no interval."
    )
    return Table("static_dynamic", title, caption, rows[keep], columns)


def _dynamic(section: Section) -> pd.DataFrame:
    rows = section.configurations
    return rows[rows["seeds"].gt(0) & rows["prune_ratio"].gt(0) & rows["method"].ne(DENSE)]


def _contrast(rows: pd.DataFrame) -> pd.DataFrame | None:
    """Static and what has a p, of an S and a budget that has static and a dynamic method at two p."""
    rows = rows[rows["method"].eq(STATIC) | (rows["prune_ratio"].notna() & rows["method"].ne(DENSE))]
    found = {}
    for (sparsity, *budget), group in rows.groupby(["sparsity", *BUDGET]):
        ratios = group.groupby("method")["prune_ratio"].nunique()
        if group["method"].eq(STATIC).any() and ratios.ge(2).any():
            found[sparsity == PAPERS_SPARSITY, sparsity, *budget] = group
    return found[max(found)] if found else None

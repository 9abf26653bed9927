"""How sure it is that sparse beats dense: probability of improvement, interquartile mean, performance profile.

The maths and its sources: robust.py. All of it is over confirmed runs; a search's winner was picked for being low.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import marks, robust, stats, style, words
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import CONFIDENCE, DENSE, Section, same_budget
from analysis.tables import Column, Table

LEVELS = 101  # of the profile


def parts(section: Section) -> list[Part]:
    """The table where dense and something sparse are confirmed, the profile where two methods have two runs each."""
    if section.confirmed.empty:
        return []
    found = []
    rows = judged(section)
    if len(rows):
        told = tuple(filter(None, [_words(rows)]))
        found.append(Part("improvement", "Does sparse beat dense?", sentences=told, tables=(table(section, rows),)))
    drawn = profile(section)
    if drawn is not None:
        caption = (
            f"Share of a method's confirmed runs at dense's budget, all its configurations together, whose "
            f"{section.fid_name} is at most so many times the dense mean: a curve that is higher and further left is "
            f"better. Band: pointwise {words.percent(CONFIDENCE)} of {robust.DRAWS:,} bootstraps over seeds within "
            "each configuration."
        )
        found.append(Part("profile", "Performance profile", drawn, caption, tables=(method_table(section),)))
    return found


def judged(section: Section) -> pd.DataFrame:
    """Confirmed sparse configurations with dense's budget: `probability`, its ends, `iqm` and `dense_iqm`.

    All intervals of the section hold together (Bonferroni), as those of the differences do.
    """
    dense = section.dense
    rows = section.confirmed
    if dense is None or dense["stage"] != "confirm":
        return rows.iloc[:0]
    rows = rows[rows["method"].ne(DENSE) & rows["verdict"].notna() & same_budget(rows, dense)]
    confidence = stats.simultaneous(CONFIDENCE, section.comparisons)
    found = [robust.probability_lower(values, dense["fid_values"], confidence) for values in rows["fid_values"]]
    return rows.assign(
        probability=[item.estimate for item in found],
        probability_low=[item.low for item in found],
        probability_high=[item.high for item in found],
        iqm=[robust.interquartile_mean(values) for values in rows["fid_values"]],
        dense_iqm=robust.interquartile_mean(dense["fid_values"]),
    )


def table(section: Section, rows: pd.DataFrame) -> Table:
    """A row per confirmed sparse configuration."""
    columns = (
        Column("configuration", words.configuration, numeric=False),
        Column("seeds", lambda row: str(row["seeds"])),
        Column("minus dense", lambda row: words.interval(row, "fid_difference", row["fid_mean"])),
        Column("verdict", lambda row: words.text(row["verdict"]), numeric=False),
        Column("P(sparse < dense)", _probability),
        Column("IQM", lambda row: words.number(row["iqm"])),
        Column("IQM of dense", lambda row: words.number(row["dense_iqm"])),
    )
    keep = [
        "method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings", "configuration", "seeds",
        "fid_mean", "fid_std", "fid_difference", "fid_difference_low", "fid_difference_high", "verdict", "probability",
        "probability_low", "probability_high", "iqm", "dense_iqm", "model", "dataset", "protocol",
    ]  # fmt: skip
    caption = (
        f"P: the probability that a run of the configuration has a lower {section.fid_name} than a run of dense "
        f"(one half: no difference), with Newcombe's interval; all hold together at {words.percent(CONFIDENCE)}. "
        "IQM: mean of the middle half of the runs; with three seeds or fewer it is the mean. The verdict is the Welch "
        "interval's."
    )
    return Table("improvement", "Probability that sparse beats dense", caption, rows[keep], columns)


def profile(section: Section) -> go.Figure | None:
    """Share of runs at or below a multiple of the dense mean, a curve per method."""
    dense, groups = section.dense, _groups(section)
    if dense is None or dense["stage"] != "confirm" or dense["fid_mean"] <= 0 or len(groups) < 2:
        return None
    ratios = {method: [np.asarray(v) / dense["fid_mean"] for v in values] for method, values in groups.items()}
    everything = np.concatenate([run for runs in ratios.values() for run in runs])
    levels = np.linspace(everything.min() * 0.98, everything.max() * 1.02, LEVELS)
    drawn = style.figure(f"{plain(section.fid_name)}, times the dense mean", "share of runs at or below")
    looks = style.looks(section.methods())
    for method, runs in ratios.items():
        share, low, high = robust.performance_profile(runs, levels.tolist(), CONFIDENCE)
        colour = looks[method][0]
        # As the curve: level up to the next value, then up. Slopes between two would let it leave its band.
        steps = np.repeat(levels, 2)[1:]
        marks.band(drawn, steps, np.repeat(low, 2)[:-1], np.repeat(high, 2)[:-1], colour, plain(method))
        count = sum(len(run) for run in runs)
        drawn.add_scatter(
            x=levels, y=share, mode="lines", name=f"{plain(method)} ({count} runs)", legendgroup=plain(method),
            line={"color": colour, "width": 2, "shape": "hv"},
            hovertemplate=f"{plain(method)}: %{{y:.0%}} of runs at most %{{x:.3f}} times dense<extra></extra>",
        )  # fmt: skip
    return drawn.update_yaxes(range=[-0.02, 1.04], tickformat=".0%")


def method_table(section: Section) -> Table:
    """IQM of a method's confirmed runs at dense's budget with a stratified bootstrap interval."""
    rows = []
    for method, groups in _groups(section).items():
        found = robust.interquartile_mean_interval(groups, CONFIDENCE)
        rows.append({
            "method": method, "configurations": len(groups), "runs": sum(len(group) for group in groups),
            "iqm": found.estimate, "iqm_low": found.low, "iqm_high": found.high,
            "model": section.model, "dataset": section.dataset, "protocol": section.protocol_text,
        })  # fmt: skip
    columns = (
        Column("method", lambda row: words.text(row["method"]), numeric=False),
        Column("configurations", lambda row: words.integer(row["configurations"])),
        Column("runs", lambda row: words.integer(row["runs"])),
        Column(f"IQM of {section.fid_name}", lambda row: words.number(row["iqm"])),
        Column("interval", lambda row: f"{words.number(row['iqm_low'])} to {words.number(row['iqm_high'])}"),
    )
    caption = (
        f"All confirmed runs of a method at dense's budget. Percentile bootstrap at {words.percent(CONFIDENCE)}, seeds "
        "drawn within each configuration: it knows nothing of configurations that were not confirmed, and with few "
        "seeds is too narrow."
    )
    return Table("iqm", "Interquartile mean per method", caption, pd.DataFrame(rows), columns)


def _groups(section: Section) -> dict[str, list[list[float]]]:
    """method -> FIDs of each configuration confirmed at dense's budget, methods with two runs or more."""
    rows = section.confirmed
    dense = section.dense
    if dense is not None:
        rows = rows[same_budget(rows, dense)]
    groups = {method: rows[rows["method"].eq(method)]["fid_values"].tolist() for method in section.methods()}
    return {method: values for method, values in groups.items() if sum(len(v) for v in values) > 1}


def _probability(row: dict[str, object]) -> str:
    estimate, low, high = (words.percent(row[f"probability{end}"]) for end in ("", "_low", "_high"))
    return estimate if low == words.NONE else f"{estimate} ({low} to {high})"


def _words(rows: pd.DataFrame) -> str:
    """What the verdicts come to."""
    names = {
        stats.NO_DIFFERENCE: "no difference from dense is shown for",
        "lower": "a lower mean than dense's is shown for",
        "higher": "a higher mean than dense's is shown for",
        stats.NOT_JUDGED: "too few seeds to judge have",
    }
    told = []
    for verdict, text in names.items():
        mine = [words.configuration(row) for row in marks.records_of(rows[rows["verdict"].eq(verdict)])]
        if mine:
            told.append(f"{text} {words.listed(mine, most=4)}")
    text = "; ".join(told)
    return f"{text[:1].upper()}{text[1:]}." if text else ""

"""FID against the number of DDIM steps (the sparse paper's Table 8, Figure 6), from what `raysparse evaluate` measured.

Each number of steps is a protocol of its own: values compare among models at one number, and that is what the table's
columns and the figure's marks above one tick are. That more steps give a lower FID is no merit of a model.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis import marks, stats, style, words
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import BUDGET, DENSE, Section, budget_of
from analysis.tables import Column, Row, Table, steps_column

STEPS = "ddim_steps"
# What a row of the table stands for.
KEYS = [
    "method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings", "configuration", *BUDGET, "stage",
    "trial",
]  # fmt: skip


def parts(section: Section) -> list[Part]:
    """The figure and the table, where models were evaluated at two numbers of steps or more."""
    rows = by_steps(section)
    if rows[STEPS].nunique() < 2:
        return []
    caption = (
        "Each number of DDIM steps is a protocol of its own: compare models above one tick. A sample's FLOPs grow "
        "with the number of steps."
    )
    told: tuple[str, ...] = ()
    other = len(section.evaluations) - int(
        section.evaluations["protocol"].map(lambda p: _rest(p) == _rest(section.protocol_text)).sum()
    )
    if other:
        told = (f"{other} evaluations under protocols that differ in more than the number of steps are left out here.",)
    return [Part("sampling_steps", f"{section.fid_name} against sampling steps", figure(section, rows), caption,
                 sentences=told, tables=(table(section, rows),))]  # fmt: skip


def by_steps(section: Section) -> pd.DataFrame:
    """A row per configuration, stage, trial (confirmed: all together) and number of steps: seeds, fid_mean, fid_std.

    The trials' own results are included.

    Only models at full budget, only protocols that differ from the section's in the number of steps alone, and no
    stage pooled with another.
    """
    again = section.evaluations
    if again.empty or STEPS not in section.protocol:
        return pd.DataFrame(columns=[STEPS])
    again = again[again["protocol"].map(lambda text: _rest(text) == _rest(section.protocol_text))]
    again = again[again["step"].ge(again["total_steps"]) & again["fid"].notna()]
    measured = again.assign(**{STEPS: again["protocol"].map(_steps)})
    own = section.trials[section.trials["trial_id"].isin(measured["trial_id"]) & section.trials["result_fid"].notna()]
    own = own.assign(**{STEPS: section.protocol[STEPS], "fid": own["result_fid"]})
    rows = pd.concat([own, measured], ignore_index=True).drop_duplicates(["trial_id", STEPS])
    confirmed = rows["stage"].eq("confirm")
    rows["trial"] = rows["trial_id"].mask(confirmed, "")  # search: each trial on its own
    rows["stage"] = rows["stage"].where(confirmed, "search")
    found = rows.groupby([*KEYS, STEPS], dropna=False)["fid"].agg(list).reset_index(name="fid_values")
    samples = [stats.sample(values) for values in found["fid_values"]]
    return found.assign(
        seeds=[s.n for s in samples], fid_mean=[s.mean for s in samples], fid_std=[s.std for s in samples]
    ).sort_values(["method", "sparsity", STEPS], key=_dense_first, kind="stable", ignore_index=True)


def figure(section: Section, rows: pd.DataFrame) -> go.Figure:
    """A line per configuration over the number of steps (a logarithmic axis with its own ticks)."""
    drawn = style.figure("DDIM steps (each a protocol of its own)", plain(section.fid_name))
    looks = style.looks(section.methods())
    lines = ["method", "configuration", "stage", "trial"]
    budgets = rows["total_steps"].nunique() > 1
    for (method, _, stage, _), points in rows.groupby(lines, sort=False, dropna=False):
        colour, symbol = looks[method]
        confirmed = stage == "confirm"
        first = marks.records_of(points)[0]
        trained = f", trained {words.integer(first['total_steps'])} steps" if budgets else ""
        name = plain(words.configuration(first)) + trained + ("" if confirmed else " (one seed)")
        bars = {"type": "data", "array": points["fid_std"], "thickness": 1.5, "width": 4, "color": colour}
        drawn.add_scatter(
            x=points[STEPS], y=points["fid_mean"], mode="lines+markers", name=name, legendgroup=name,
            error_y=bars if confirmed else None, opacity=1.0 if confirmed else style.FADED,
            line={"color": colour, "width": 2, "dash": "solid" if confirmed else "dot"},
            marker={"symbol": symbol if confirmed else f"{symbol}-open", "size": 9}, customdata=marks.keys(points),
            text=[f"<b>{name}</b><br>{words.spread(m, s)}" for m, s in
                  zip(points["fid_mean"], points["fid_std"], strict=True)],
            hovertemplate="%{text} at %{x} steps<extra></extra>",
        )  # fmt: skip
    ticks = sorted(rows[STEPS].unique())
    drawn.update_xaxes(type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    return marks.spanning(drawn, rows["fid_mean"])


def table(section: Section, rows: pd.DataFrame) -> Table:
    """A row per configuration, a column per number of steps; bold where it beats dense at that number."""
    steps = [int(step) for step in sorted(rows[STEPS].unique())]
    wide = rows.drop_duplicates(KEYS, keep="first")[KEYS].reset_index(drop=True)
    for step in steps:
        at = rows[rows[STEPS].eq(step)].rename(columns={n: f"{n}_{step}" for n in ("fid_mean", "fid_std", "seeds")})
        wide = wide.merge(at[[*KEYS, f"fid_mean_{step}", f"fid_std_{step}", f"seeds_{step}"]], on=KEYS, how="left")
    columns = [
        Column("configuration", words.configuration, numeric=False),
        *steps_column(wide),
        Column("stage", lambda row: words.text(row["stage"]), numeric=False),
    ]
    for step in steps:
        columns.append(_column(wide, step))
    frame = wide.assign(model=section.model, dataset=section.dataset, protocol=section.protocol_text)
    caption = (
        f"{section.fid_name} at each number of DDIM steps, mean ± standard deviation over seeds. Bold: lower than "
        "dense in that column (of the same stage and budget), underlined: the lowest sparse one there; columns are "
        "protocols and do not compare."
    )
    return Table("sampling_steps", f"{section.fid_name} at each number of DDIM steps", caption, frame, tuple(columns))


def _column(wide: pd.DataFrame, step: int) -> Column:
    mean = f"fid_mean_{step}"
    is_dense = wide["method"].eq(DENSE)
    # Stage and budget name a group: no mark is won against another one's.
    groups = (rows.groupby(["stage", *BUDGET]) for rows in (wide[is_dense], wide[~is_dense]))
    dense, lowest = (group[mean].min().to_dict() for group in groups)

    def key(row: Row) -> tuple[Any, ...]:
        return (row["stage"], *budget_of(row))

    return Column(
        f"{step} steps",
        lambda row: words.spread(row[mean], row[f"fid_std_{step}"]),
        bold=lambda row: row["method"] != DENSE and bool(row[mean] < dense.get(key(row), math.nan)),
        underlined=lambda row: row["method"] != DENSE and bool(row[mean] == lowest.get(key(row))),
    )


def _dense_first(values: pd.Series) -> pd.Series:
    return values.map(lambda name: "" if name == DENSE else name) if values.name == "method" else values


def _fields(protocol: str) -> Row:
    try:
        found: Any = json.loads(protocol)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"protocol": protocol}


def _rest(protocol: str) -> Row:
    return {name: value for name, value in _fields(protocol).items() if name != STEPS}


def _steps(protocol: str) -> Any:
    return _fields(protocol).get(STEPS)

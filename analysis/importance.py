"""Which settings of the search mattered: Optuna's PED-ANOVA on a study rebuilt from the records, and the trials drawn.

The one file outside raysparse/sweep that imports optuna, and only when a report asks for it; without Optuna installed
the part is left out with a word. PED-ANOVA (Watanabe et al. 2023) asks how much a setting decides whether a trial is
among the best tenth; Optuna 5's handles settings that only some methods have. fANOVA would bring scikit-learn.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import marks, style, words
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import DENSE, Section, usual_steps
from analysis.tables import Column, Table

FEWEST = 8  # results; below, the best tenth is one trial and the answer an accident of which
COLOURS = ("#2c5d8f", "#3b9c9c", "#8fbf5a", "#e0a63a", "#c8503c")  # best fifth to worst
_BETWEEN = re.compile(r", (?=[\w.]+=)")  # two of the other settings
COLUMNS = {"sparsity": "S", "prune_ratio": "p", "update_interval_steps": "ΔTe"}


def parts(section: Section) -> list[Part]:
    """Importances and parallel coordinates of the search's results, or a word on why not."""
    rows = settings(section)
    names = [name for name in rows.columns if name not in ("trial_id", "value")]
    title = "Which settings mattered"
    if section.trials["stage"].eq("search").sum() == 0 or not names:
        return []
    steps, several = results(section)["total_steps"], _done(section)["total_steps"].nunique() > 1
    budget = f"{steps.iloc[0]:,} steps, of the budgets here the one with most" if several else "full budget"
    if len(rows) < FEWEST:
        told = f"Not shown: {len(rows)} search trials have a result at {budget}, {FEWEST} are needed."
        return [Part("importance", title, sentences=(told,))]
    if rows["value"].nunique() == 1:
        return [Part("importance", title, sentences=("Not shown: all results are equal.",))]
    found = []
    try:
        scores = importances(rows)
    except ModuleNotFoundError:
        found.append(Part("importance", title, sentences=("Not shown: Optuna is not installed here.",)))
    else:
        told = (
            f"Over {len(rows)} search trials at {budget}; trials that were stopped are not among them, so that what "
            "showed itself bad early counts for less than it should. Whether a method has a setting at all counts as a "
            "value of it, and what only a trial or two had is judged by these. An importance is no direction and no "
            "effect size."
        )
        caption = "Optuna's PED-ANOVA: how much a setting decides whether a trial is in the best tenth; they sum to 1."
        found.append(Part("importance", title, figure(scores), caption, (told,), tables=(table(section, scores),)))
    older = section.trials["defaults"].isna().any()
    found.append(
        Part("parallel", "All settings of the search at once", parallel(section, rows),
             f"A line per search trial at {budget}, the best fifth dark blue and drawn last, the worst red. p and "
             "ΔTe are logarithmic; at “none” the method has no such setting, or no use for it"
             f"{', or the record is of an earlier version and leaves out a default' if older else ''}.")
    )  # fmt: skip
    return found


def results(section: Section) -> pd.DataFrame:
    """The search trials with a result, of one budget: else what mattered would be the steps, by way of whatever differs
    between two sweeps. Batch sizes are a setting."""
    return usual_steps(_done(section))


def _done(section: Section) -> pd.DataFrame:
    return section.trials[section.trials["stage"].eq("search") & section.trials["result_fid"].notna()]


def settings(section: Section) -> pd.DataFrame:
    """A row per trial of `results`: trial_id, value (FID), and each setting that varies (None: has none)."""
    trials = results(section)
    rows = pd.DataFrame({"trial_id": trials["trial_id"], "value": trials["result_fid"], "method": trials["method"]})
    sparse = trials["method"].ne(DENSE)
    for column, name in COLUMNS.items():
        rows[name] = trials[column].astype("float64").where(sparse)
    others = [_others(text) for text in trials["other_settings"]]
    for name in sorted({name for found in others for name in found}):
        rows[name] = [found.get(name) for found in others]
    varying = [name for name in rows.columns[2:] if rows[name].nunique(dropna=False) > 1]
    return rows[["trial_id", "value", *varying]].reset_index(drop=True)


def importances(rows: pd.DataFrame) -> dict[str, float]:
    """setting -> importance, largest first, summing to 1. rows: `settings`. ModuleNotFoundError without Optuna."""
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    level = optuna.logging.get_verbosity()  # a notebook's own; a new study is announced on stderr otherwise
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Of a tie of most trials, of a method with one trial that alone lacks a setting: the part's words say so.
            warnings.simplefilter("ignore", UserWarning)
            scores = optuna.importance.get_param_importances(_study(rows, optuna), evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    return {name: float(score) for name, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))}


def figure(scores: dict[str, float]) -> go.Figure:
    """A bar per setting."""
    names = list(scores)[::-1]
    drawn = style.figure("importance", "", height=max(220, 110 + 34 * len(names)))
    drawn.add_bar(
        x=[scores[name] for name in names], y=[plain(name) for name in names], orientation="h",
        marker={"color": style.KNOWN["rigl"][0]}, hovertemplate="%{y}: %{x:.3f}<extra></extra>", showlegend=False,
    )  # fmt: skip
    return drawn.update_xaxes(range=[0, 1.02 * max([*scores.values(), 0.01])]).update_yaxes(showgrid=False)


def table(section: Section, scores: dict[str, float]) -> Table:
    """The importances."""
    frame = pd.DataFrame({"setting": list(scores), "importance": list(scores.values())})
    columns = (
        Column("setting", lambda row: words.text(row["setting"]), numeric=False),
        Column("importance", lambda row: f"{row['importance']:.3f}"),
    )
    frame = frame.assign(model=section.model, dataset=section.dataset, protocol=section.protocol_text)
    return Table("importance", "Importance of settings", "Optuna's PED-ANOVA, normalised to sum 1.", frame, columns)


def parallel(section: Section, rows: pd.DataFrame) -> go.Figure:
    """A line per trial across one upright axis per setting and one of the FID.

    Lines of a plain scatter: the library's own parallel coordinates draw by WebGL and make functions out of text,
    which the page's content-security policy forbids.
    """
    names = [*(name for name in rows.columns if name not in ("trial_id", "value")), section.fid_name]
    values = rows.rename(columns={"value": section.fid_name})
    axes = [_axis(values[name], name in names[:-1] and _logarithmic(values[name].dropna(), name)) for name in names]
    places = np.column_stack([axis[0] for axis in axes])
    drawn = style.figure("", "", height=460)
    fifth = np.ceil(values[section.fid_name].rank(method="first") / len(values) * len(COLOURS)).astype(int) - 1
    for number in reversed(range(len(COLOURS))):
        mine = places[fifth.eq(number).to_numpy()]
        if not len(mine):
            continue
        y = np.column_stack([mine, np.full(len(mine), np.nan)]).ravel()
        x = np.tile([*range(len(names)), np.nan], len(mine))
        label = ("best fifth", "second", "middle", "fourth", "worst fifth")[number]
        drawn.add_scatter(x=x, y=y, mode="lines", name=label, line={"color": COLOURS[number], "width": 1.5},
                          opacity=0.9 if number == 0 else 0.5, hoverinfo="skip")  # fmt: skip
    for place, (_, ticks) in enumerate(axes):
        for height, text in ticks:
            drawn.add_annotation(x=place, y=height, text=plain(text), showarrow=False, xanchor="left", xshift=4)
    drawn.update_xaxes(tickvals=list(range(len(names))), ticktext=[plain(name) for name in names], side="top",
                       showgrid=True, range=[-0.1, len(names) - 0.4])  # fmt: skip
    drawn.update_layout(legend={"y": -0.06, "yanchor": "top"})
    return drawn.update_yaxes(visible=False, range=[-0.22, 1.06])


def _study(rows: pd.DataFrame, optuna: Any) -> Any:
    study = optuna.create_study(direction="minimize")
    names = [name for name in rows.columns if name not in ("trial_id", "value")]
    distributions = {name: _distribution(rows[name], name, optuna) for name in names}
    for row in marks.records_of(rows):
        params = {name: row[name] for name in names if not words.missing(row[name])}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions={name: distributions[name] for name in params}, value=row["value"]
            )
        )
    return study


def _distribution(values: pd.Series, name: str, optuna: Any) -> Any:
    known = values.dropna()
    if not pd.api.types.is_numeric_dtype(known):
        return optuna.distributions.CategoricalDistribution(sorted(known.unique()))
    low, high = float(known.min()), float(known.max())
    if low == high:  # nothing to choose where it exists, but whether it exists is a choice
        return optuna.distributions.CategoricalDistribution([low])
    return optuna.distributions.FloatDistribution(low, high, log=_logarithmic(known, name))


def _logarithmic(known: pd.Series, name: str) -> bool:
    if name == "S" or not pd.api.types.is_numeric_dtype(known) or not len(known):
        return False
    return bool(known.min() > 0) and bool(known.max() / known.min() >= 4)


def _others(text: str) -> dict[str, Any]:
    """`other_settings` taken apart; numbers as numbers."""
    found: dict[str, Any] = {}
    for piece in _BETWEEN.split(text) if text else []:  # a list has commas of its own
        name, equals, value = piece.partition("=")
        if equals:
            try:
                number = json.loads(value)
            except ValueError:
                number = None
            whole = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            found[name] = float(number) if whole else value
    return found


def _axis(values: pd.Series, log: bool) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights in [0, 1] of a setting's values (-.15: it has none), and its ticks."""
    none = [(-0.15, "none")] if values.isna().any() else []
    known = values.dropna()
    if not pd.api.types.is_numeric_dtype(known):
        names = sorted(known.astype(str).unique())
        heights = {label: place / max(len(names) - 1, 1) for place, label in enumerate(names)}
        found = values.map(lambda v: -0.15 if words.missing(v) else heights[str(v)])
        shown = names if len(names) <= 8 else [names[0], names[-1]]
        return found.to_numpy(np.float64), [*none, *((heights[label], label) for label in shown)]
    low, high = float(known.min()), float(known.max())
    scaled = (
        np.log(values.astype("float64") / low) / math.log(high / low) if log else (values - low) / ((high - low) or 1)
    )
    ticks = [(0.0, words.plain_number(low)), *([(1.0, words.plain_number(high))] if high > low else [])]
    return scaled.fillna(-0.15).to_numpy(np.float64), [*none, *ticks]

"""The tables of a section: raw numbers for CSV, one formatting of them for Markdown, LaTeX and the page.

`Table.frame` is what the CSV holds (all digits, units in the column names); `Table.columns` says what a reader sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pandas as pd

from analysis import latex, markup, words
from analysis.sections import BUDGET, CONFIDENCE, DENSE, Section, budget_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One visible column. text: row -> what stands in the cell (plain text, escaped later)."""

    heading: str
    text: Callable[[Row], str]
    numeric: bool = True
    bold: Callable[[Row], bool] | None = None  # row -> stands out; None: in no row
    underlined: Callable[[Row], bool] | None = None

    def marks(self, row: Row) -> tuple[bool, bool]:
        """Whether the cell is bold, and whether it is underlined."""
        return (self.bold is not None and self.bold(row), self.underlined is not None and self.underlined(row))


@dataclass(frozen=True)
class Table:
    """A table under a file name; empty frames are allowed and say `nothing`."""

    name: str
    title: str
    caption: str
    frame: pd.DataFrame
    columns: tuple[Column, ...]
    nothing: str = "Nothing to show yet."

    @cached_property
    def rows(self) -> list[Row]:
        """Of the frame, as dicts; three forms are made of them."""
        return [{str(key): value for key, value in row.items()} for row in self.frame.to_dict("records")]

    def csv(self) -> str:
        """RFC 4180 text, a header line, empty cells for what is missing."""
        return str(self.frame.to_csv(index=False, lineterminator="\n"))

    def markdown(self, most: int | None = None) -> str:
        """A GitHub table; beyond `most` rows a line says how many are left out."""
        if self.frame.empty:
            return self.nothing + "\n"
        lines = [[markup.markdown(column.heading) for column in self.columns]]
        lines += [[_markdown_cell(column, row) for column in self.columns] for row in self.rows[:most]]
        rule = ["---:" if column.numeric else ":---" for column in self.columns]
        out = [f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]]]
        left = len(self.frame) - len(self.rows[:most])
        return "\n".join(out + ([f"\n{left} more rows in {self.name}.md"] if left else [])) + "\n"

    def latex(self) -> str:
        """A `table` environment with booktabs rules."""
        if self.frame.empty:
            return f"% {latex.escape(self.nothing)}\n"
        rows = [[latex.cell(column.text(row), *column.marks(row)) for column in self.columns] for row in self.rows]
        headings = [column.heading for column in self.columns]
        return latex.table(self.name, self.caption, headings, rows, [column.numeric for column in self.columns])


def _settings() -> tuple[Column, ...]:
    return (
        Column("method", lambda row: words.text(row["method"]), numeric=False),
        Column("S", lambda row: words.plain_number(row["sparsity"])),
        Column("p", lambda row: words.plain_number(row["prune_ratio"])),
        Column("ΔTe", lambda row: words.integer(row["update_interval_steps"])),
    )


def _other(frame: pd.DataFrame) -> tuple[Column, ...]:
    """The column of further settings, where any vary."""
    if not frame["other_settings"].astype(bool).any():
        return ()
    return (Column("other settings", lambda row: words.others(row["other_settings"]), numeric=False),)


def steps_column(frame: pd.DataFrame) -> tuple[Column, ...]:
    """The column of steps, where sweeps of several budgets stand in one table."""
    if frame["total_steps"].nunique() < 2:
        return ()
    return (Column("steps", lambda row: words.integer(row["total_steps"])),)


def _results(section: Section, against: tuple[Column, ...] = ()) -> tuple[Column, ...]:
    return (
        Column("seeds", _seeds),
        Column(section.fid_name, lambda row: words.spread(row["fid_mean"], row["fid_std"])),
        *against,
        Column(section.kid_name, lambda row: words.spread(row["kid_mean"], row["kid_std"])),
        Column("params active", lambda row: words.integer(row["params_active"])),
        Column("params ratio", lambda row: words.ratio(row["params_ratio"])),
        Column("inference FLOPs ratio", lambda row: words.ratio(row["flops_inference_ratio"])),
        Column("train FLOPs ratio", lambda row: words.ratio(row["flops_train_ratio"])),
        Column("train time", lambda row: words.duration(row["train_s"])),
        Column("time ratio", lambda row: words.ratio(row["train_s_ratio"])),
    )


_AGAINST = (
    Column("minus dense", lambda row: words.interval(row, "fid_difference", row["fid_mean"])),
    Column("verdict", lambda row: words.text(row["verdict"]), numeric=False),
)


def main(section: Section) -> Table:
    """Every configuration with a result, confirmed ones first."""
    frame = section.configurations
    frame = frame[frame["seeds"].gt(0) | frame["stage"].eq("confirm")]
    against = _AGAINST if frame["verdict"].notna().any() else ()
    stage = Column("stage", lambda row: row["stage"], numeric=False)
    columns = (*_settings(), *_other(frame), *steps_column(frame), stage)
    caption = (
        "FID of the last report at full budget. Confirmed rows: mean ± standard deviation over seeds; search rows: one "
        "seed, no spread, no claim. Ratios are to the same model at S = 0; the time ratio is of measured seconds per "
        "step, to the dense row of the same stage."
    )
    if against:
        sure = words.percent(CONFIDENCE)
        caption += f" In brackets: Welch intervals at {sure}"
        caption += f", all {section.comparisons} together." if section.comparisons > 1 else "."
    return Table(
        "main", "Configurations", caption, frame.drop(columns="fid_values"), (*columns, *_results(section, against)),
        "No trial has reached its full budget yet.",
    )  # fmt: skip


def summary(section: Section) -> Table:
    """Dense and the best configuration of each method, of the confirmed results where there are any (Tables 1, 2)."""
    frame = _dense_and_best(section)
    confirmed = frame["stage"].eq("confirm")
    stage = "confirmed, over seeds" if len(frame) and confirmed.all() else "search, one seed each"
    if confirmed.any() and not confirmed.all():
        stage = "confirmed, over seeds; with one seed from the search"
    several = " of all budgets, and dense at each of these" if frame["total_steps"].nunique() > 1 else ""
    caption = (
        f"The lowest FID per method{several} ({stage}), mean ± standard deviation. {MARKED} Params and FLOPs of dense "
        "are counts, those of the others ratios to the same model at S = 0; test FLOPs are of one sample."
    )
    columns = (*_settings(), *_other(frame), *steps_column(frame), Column("seeds", _seeds), *marked(section), *costs())
    return Table(
        "summary", "Dense and the best of each method", caption, frame.drop(columns="fid_values"), columns,
        "No trial has reached its full budget yet.",
    )  # fmt: skip


def _dense_and_best(section: Section) -> pd.DataFrame:
    """The lowest row of each sparse method, and above them the dense of each budget that they have."""
    ranked = section.ranked
    best = ranked[ranked["method"].ne(DENSE)].sort_values("fid_mean", kind="stable").drop_duplicates("method")
    dense = [section.dense_of(rows.iloc[0]) for _, rows in best.groupby(BUDGET)]
    shown = [row for row in dense if row] or [row for row in [section.dense] if row]
    frames = [frame for frame in (pd.DataFrame(shown), best) if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else ranked


MARKED = (
    "Bold: a lower mean than dense of the same budget; underlined: the lowest of the sparse ones of a budget (the "
    "papers' marks, no claim of a difference)."
)


def marked(section: Section) -> tuple[Column, ...]:
    """FID and KID, each budget by itself: bold where the mean is below dense's, underlined the lowest sparse one."""
    budgets = section.ranked[section.ranked["method"].ne(DENSE)].groupby(BUDGET)
    judges = {budget: section.dense_of(rows.iloc[0]) for budget, rows in budgets}
    columns = []
    for name, value in ((section.fid_name, "fid"), (section.kid_name, "kid")):
        dense = {budget: row[f"{value}_mean"] for budget, row in judges.items() if row}
        columns.append(spread_column(name, value, dense, budgets[f"{value}_mean"].min().to_dict()))
    return tuple(columns)


def spread_column(heading: str, value: str, dense: Mapping[Any, float], lowest: Mapping[Any, float]) -> Column:
    """`<value>_mean ± <value>_std`; bold where a sparse mean is below `dense` of its budget, underlined where it is
    `lowest` there."""
    mean = f"{value}_mean"
    return Column(
        heading,
        lambda row: words.spread(row[mean], row[f"{value}_std"]),
        bold=lambda row: row["method"] != DENSE and bool(row[mean] < dense.get(budget_of(row), math.nan)),
        underlined=lambda row: row["method"] != DENSE and bool(row[mean] == lowest.get(budget_of(row))),
    )


def costs() -> tuple[Column, ...]:
    """Parameters and FLOPs as in the papers' tables: counts for dense, ratios for the others; both conventions."""

    def cell(row: Row, count: str, share: str) -> str:
        return words.scientific(row[count]) if row["method"] == DENSE else f"{words.ratio(row[share])} ×"

    names = (
        ("params", "params_active", "params_ratio"),
        ("train FLOPs", "flops_train_true", "flops_train_ratio"),
        ("test FLOPs", "flops_inference_true", "flops_inference_ratio"),
        ("train FLOPs (papers' count)", "flops_train_paper", "flops_train_paper_ratio"),
        ("test FLOPs (papers' count)", "flops_inference_paper", "flops_inference_paper_ratio"),
    )
    return tuple(Column(name, partial(cell, count=count, share=share)) for name, count, share in names)


def trials(section: Section) -> Table:
    """Every trial, whatever became of it."""
    keep = [
        "trial_id", "stage", "seed", "method", "sparsity", "prune_ratio", "update_interval_steps", "allocation",
        "other_settings", "configuration", "state", "state_reason", "step", "total_steps", "stopped_at_step", "fid",
        "early_fid", "kid", "kid_std", "result_fid", "result_kid", "train_loss", "validation_loss", "density",
        "topology_updates", "params_total", "params_active", "flops_inference_true", "flops_inference_paper",
        "flops_train_true", "flops_train_paper", "flops_spent_true", "flops_spent_paper", "train_s", "evaluate_s",
        "peak_memory_bytes", "batch_size", "world_size", "reports", "sweep", "command",
        "model", "dataset", "protocol", "intermediate_protocol",
    ]  # fmt: skip
    columns = (
        Column("trial", lambda row: row["trial_id"], numeric=False),
        Column("stage", lambda row: row["stage"], numeric=False),
        Column("seed", lambda row: words.integer(row["seed"])),
        *_settings(),
        *_other(section.trials),
        Column("state", lambda row: words.text(row["state"]).lower(), numeric=False),
        Column("step", lambda row: f"{words.integer(row['step'])} / {words.integer(row['total_steps'])}"),
        Column(f"last {section.fid_name}", lambda row: words.number(row["fid"])),
        *_early(section),
        Column("validation loss", lambda row: words.number(row["validation_loss"])),
        Column("density", lambda row: words.ratio(row["density"])),
        Column("train time", lambda row: words.duration(row["train_s"])),
        Column("evaluation", lambda row: words.duration(row["evaluate_s"])),
        Column("reason", lambda row: words.text(row["state_reason"]), numeric=False),
    )
    frame = section.trials[keep].sort_values(["stage", "method", "sparsity", "trial_id"], kind="stable")
    caption = "The last report of each trial. Values of trials that ended early are not results."
    return Table("trials", "Trials", caption, frame, columns)


def _early(section: Section) -> tuple[Column, ...]:
    """The last FID of the intermediate protocol, where there is one."""
    if section.early_protocol is None:
        return ()
    return (Column(f"last {section.early_name}", lambda row: words.number(row["early_fid"])),)


def stopped(section: Section) -> Table:
    """What the trial scheduler, or a person, ended before its budget, when, and what that saved."""
    frame = stopped_trials(section)
    columns = (
        Column("trial", lambda row: row["trial_id"], numeric=False),
        *_settings(),
        *_other(frame),
        Column("stopped at", lambda row: words.integer(row["stopped_at_step"])),
        Column("of steps", lambda row: words.integer(row["total_steps"])),
        Column("steps saved", lambda row: words.integer(row["steps_saved"])),
        Column("train FLOPs saved", lambda row: words.scientific(row["flops_saved_true"])),
        Column(f"{section.early_name} then", lambda row: words.number(row["early_fid"])),
        Column("reason", lambda row: words.text(row["state_reason"]), numeric=False),
    )
    caption = (
        "Trials ended early by the trial scheduler or a person (see the reason), earliest first; FLOPs in the true "
        "convention."
    )
    return Table("stopped", "Stopped early", caption, frame, columns, "No trial was stopped early.")


def stopped_trials(section: Section) -> pd.DataFrame:
    """Stopped trials with `steps_saved`, `flops_saved_true` and `rung` (none: a person did it), earliest first."""
    frame = section.trials[section.trials["state"].eq("STOPPED") & ~section.trials["full_budget"]]
    at = frame["stopped_at_step"].fillna(frame["step"]).fillna(0)
    saved = (frame["total_steps"] - at).clip(lower=0)
    frame = frame.assign(
        rung=frame["stopped_at_step"],
        stopped_at_step=at,
        steps_saved=saved,
        flops_saved_true=frame["flops_train_true"] * saved / frame["total_steps"],
    )
    keep = [
        "trial_id", "stage", "seed", "method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings",
        "configuration", "rung", "stopped_at_step", "total_steps", "steps_saved", "flops_saved_true", "fid",
        "early_fid", "kid", "state_reason", "model", "dataset", "protocol", "intermediate_protocol",
    ]  # fmt: skip
    return frame[keep].sort_values(["stopped_at_step", "trial_id"], kind="stable", ignore_index=True)


def _markdown_cell(column: Column, row: Row) -> str:
    bold, underlined = column.marks(row)
    text = markup.markdown(column.text(row))
    text = f"<u>{text}</u>" if underlined else text
    return f"**{text}**" if bold else text


def _seeds(row: Row) -> str:
    if row["seeds"] == row["seeds_started"]:
        return str(row["seeds"])
    return f"{row['seeds']} of {row['seeds_started']}"

"""What early stopping saved, and how sure its choice is: rank correlation between the rungs and the end."""

from __future__ import annotations

import pandas as pd

from analysis import figures, marks, robust, stats, tables, words
from analysis.parts import Part
from analysis.sections import CONFIDENCE, Section, usual_steps
from analysis.tables import Column, Table

MOST_RUNGS = 6


def parts(section: Section) -> list[Part]:
    """The timeline with what was saved, the list of what was stopped, and the correlation of rungs."""
    stopped = tables.stopped(section)
    found = [
        Part("timeline", "What was stopped, and when", figures.timeline(section), saved(section)),
        Part("stopped", stopped.title, tables=(stopped,)),
    ]
    rows = correlations(section)
    if len(rows):
        found.append(Part("rungs", "How well an early FID tells the final order", sentences=(_words(rows),),
                          tables=(table(section, rows),)))  # fmt: skip
    return found


def saved(section: Section) -> str:
    """Steps and FLOPs that the stopped trials did not spend, in words."""
    stopped = tables.stopped_trials(section)
    stopped = stopped[stopped["stage"].ne("confirm")]
    searched = section.trials[section.trials["stage"].ne("confirm")]
    budget = int(searched["total_steps"].sum())
    if stopped.empty or not budget:
        return "A line per search trial, as long as it trained. No trial was stopped early."
    steps, flops = int(stopped["steps_saved"].sum()), float(stopped["flops_saved_true"].sum())
    share = flops / float(searched["flops_train_true"].sum())
    return (
        f"A line per search trial, as long as it trained. {len(stopped)} of {len(searched)} were stopped early: "
        f"{steps:,} of {budget:,} steps ({words.percent(steps / budget)}) were not spent, and "
        f"{words.percent(share)} of the training FLOPs. A stopped trial's FID is no result."
    )


def correlations(section: Section) -> pd.DataFrame:
    """A row per rung: Spearman's rho between the early FID there and FID at full budget, over search trials with both,
    of one budget: a longer training is lower in the end, whatever the order of each budget.

    Rungs: the steps at which trials were stopped, else (nothing was) the steps that all trials reported. Intervals
    hold together (Bonferroni).
    """
    trials = section.trials[section.trials["stage"].ne("confirm")]
    finished = usual_steps(trials[trials["result_fid"].notna()]).set_index("trial_id")
    trials = trials[trials["total_steps"].isin(finished["total_steps"])]
    reports = section.reports[
        section.reports["trial_id"].isin(trials["trial_id"]) & section.reports["early_fid"].notna()
    ]
    rungs = _rungs(section, reports, len(trials))
    confidence = stats.simultaneous(CONFIDENCE, len(rungs))
    rows = []
    for rung in rungs:
        at = reports[reports["step"].eq(rung)].set_index("trial_id")["early_fid"]
        both = finished[finished["total_steps"].gt(rung)].join(at.rename("fid_at_rung"), how="inner")
        found = robust.rank_correlation(both["fid_at_rung"], both["result_fid"], confidence)
        if len(both) >= 3:
            rows.append({
                "step": rung, "total_steps": both["total_steps"].iloc[0], "trials_there": len(at),
                "trials": len(both), "rho": found.estimate, "rho_low": found.low, "rho_high": found.high,
                "best_kept": _best_kept(both), "model": section.model, "dataset": section.dataset,
                "protocol": section.protocol_text,
                "intermediate_protocol": None if section.early_protocol is None else section.early_text,
            })  # fmt: skip
    return pd.DataFrame(rows)


def table(section: Section, rows: pd.DataFrame) -> Table:
    """The correlations."""
    columns = (
        Column("rung (step)", lambda row: words.integer(row["step"])),
        Column("trials that came so far", lambda row: words.integer(row["trials_there"])),
        Column("of these at full budget", lambda row: words.integer(row["trials"])),
        Column("rank correlation ρ", _rho),
        Column("best at the end was", lambda row: f"number {row['best_kept']}"),
    )
    several = section.trials[section.trials["stage"].ne("confirm")]["total_steps"].nunique() > 1
    budget = f"{rows['total_steps'].iloc[0]:,} steps, what most trials have" if several else "full budget"
    caption = (
        f"Spearman's ρ between {section.early_name} at the rung and {section.fid_name} at {budget}, with an "
        f"interval by Fisher's z, all together at {words.percent(CONFIDENCE)}. Only trials that were not stopped "
        "have both: they are the rung's own choice and lie closer together than all trials did, so that ρ over all "
        "would likely be higher. Last column: the place at this rung, among the same trials, of the one that was best "
        "in the end."
    )
    return Table("rungs", "Rank correlation between rungs and the end", caption, rows, columns)


def _rungs(section: Section, reports: pd.DataFrame, count: int) -> list[int]:
    stopped_at = tables.stopped_trials(section)["rung"].dropna()
    if len(stopped_at):
        steps = sorted({int(step) for step in stopped_at if step > 0})
    else:
        counts = reports.groupby("step")["trial_id"].nunique()
        steps = sorted(int(step) for step in counts[counts.eq(count)].index)
        steps = steps[:: -(-len(steps) // MOST_RUNGS)] if steps else []
    return steps[:MOST_RUNGS]


def _best_kept(both: pd.DataFrame) -> int:
    ranks = both["fid_at_rung"].rank(method="min")
    return int(ranks[both["result_fid"].idxmin()])


def _rho(row: dict[str, object]) -> str:
    if words.missing(row["rho"]):
        return words.NONE
    text = f"{row['rho']:.2f}"
    return text if words.missing(row["rho_low"]) else f"{text} ({row['rho_low']:.2f} to {row['rho_high']:.2f})"


def _words(rows: pd.DataFrame) -> str:
    first = marks.records_of(rows)[0]
    if words.missing(first["rho_low"]):
        return f"Only {first['trials']} trials have a value at step {first['step']:,} and at the end: too few to say."
    if first["rho_low"] > 0:
        sure = "the early order says something about the final one"
    else:
        sure = "that the early order says anything about the final one is not shown here"
    return f"At the first rung, step {first['step']:,}, ρ is {_rho(first)} over {first['trials']} trials: {sure}."

"""Two sweeps side by side: `python -m analysis compare A B`.

Only the same task under the same protocol compares. Rows are the dense baseline and each method's best, of the longest
budget that both sweeps have, and every configuration that both confirmed; a difference is B minus A with Welch's
interval, all of a task together (Bonferroni). Seeds are not paired: two sweeps rarely share code, machine and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import stats, words
from analysis.load import read
from analysis.sections import BUDGET, CONFIDENCE, DENSE, Section, budget_of, same_budget, split
from analysis.tables import Column, Table
from raysparse.errors import UsageError

SIDES = ("a", "b")
KEPT = (
    "stage", "seeds", "fid_mean", "fid_std", "params_ratio", "flops_train_ratio", "flops_inference_ratio", "train_s",
    "total_steps",
)  # fmt: skip


def tables(a: Path, b: Path) -> tuple[list[Table], list[str]]:
    """A table per task that both sweeps have, and warnings. UsageError where no FID of one compares with one of b."""
    records = read(a), read(b)
    sides = [split(found) for found in records]
    warnings = [text for found in records for text in found.warnings]
    pairs = [(one, other) for one in sides[0] for other in sides[1] if _task(one) == _task(other)]
    if not pairs:
        raise UsageError(
            f"no FID of {a} compares with one of {b}: {why_not(sides[0], sides[1])}; evaluate both the same way "
            "(`raysparse evaluate`), or report them apart"
        )
    for side, place in zip(sides, (a, b), strict=True):
        paired = {_task(one) for one, _ in pairs}
        left = [section.title for section in side if _task(section) not in paired]
        if left:
            warnings.append(
                f"not compared, for the other sweep has no such task and protocol: {'; '.join(left)} of {place}"
            )
    return [_table(one, other, a, b, number) for number, (one, other) in enumerate(pairs)], warnings


def why_not(one: Sequence[Section], other: Sequence[Section]) -> str:
    """The settings in which the nearest two sections of two sweeps differ, and their values."""

    def fields(section: Section) -> dict[str, Any]:
        named = {"model": section.model, "data set": section.dataset, "variant": section.variant or "the usual one"}
        return named | section.protocol

    def differing(a: Section, b: Section) -> list[str]:
        mine, theirs = fields(a), fields(b)
        names = sorted({*mine, *theirs}, key=lambda name: (name not in ("model", "data set", "variant"), name))
        return [
            f"{name} is {json.dumps(mine.get(name))} in the first and {json.dumps(theirs.get(name))} in the second"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]

    found = min((differing(a, b) for a in one for b in other), key=len)
    return words.listed(found) if found else "their protocols are written differently"


def rows(one: Section, other: Section) -> pd.DataFrame:
    """Configurations of two sections of one task: who, seeds and FID on both sides, difference, interval, verdict."""
    chosen: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for method in (name for name in one.methods() if name in other.methods()):
        budget = _shared(one, other, method)
        a, b = (_best(side, method, budget) for side in (one, other))
        if a is not None and b is not None:
            chosen.append((DENSE if method == DENSE else f"best {method}", a, b))
    known = {(mine["configuration"], theirs["configuration"]) for _, mine, theirs in chosen}
    for name in (name for name in one.confirmed["configuration"] if (name, name) not in known):
        mine, theirs = (side.confirmed[side.confirmed["configuration"].eq(name)] for side in (one, other))
        if len(theirs):
            chosen.append(("both confirmed", dict(mine.iloc[0]), dict(theirs.iloc[0])))
    # The best of a method is picked by the seeds that then judge it: all pairs that it was picked from count.
    pairs = sum(_judged_of(one, name) * _judged_of(other, name) for name in one.methods())
    confidence = stats.simultaneous(CONFIDENCE, pairs)
    return pd.DataFrame([_row(what, mine, theirs, confidence) for what, mine, theirs in chosen])


def _row(what: str, mine: dict[str, Any], theirs: dict[str, Any], confidence: float) -> dict[str, Any]:
    found: dict[str, Any] = {"what": what}
    for side, row in zip(SIDES, (mine, theirs), strict=True):
        found |= {f"{side}_configuration": words.configuration(row)}
        found |= {f"{side}_{name}": row[name] for name in KEPT}
    found |= {"difference": theirs["fid_mean"] - mine["fid_mean"]}
    found |= {"difference_low": float("nan"), "difference_high": float("nan"), "verdict": stats.NOT_JUDGED}
    if any(mine[name] != theirs[name] for name in BUDGET):
        found |= {"verdict": "another budget"}
    elif _judged(mine) and _judged(theirs):
        gap = stats.welch(theirs["fid_values"], mine["fid_values"], confidence)
        found |= {"difference_low": gap.low, "difference_high": gap.high, "verdict": gap.verdict}
    return found


def _judged(row: dict[str, Any]) -> bool:
    return bool(row["stage"] == "confirm" and row["seeds"] > 1)


def _judged_of(section: Section, method: str) -> int:
    rows = section.confirmed
    return int((rows["method"].eq(method) & rows["seeds"].gt(1)).sum())


def _shared(one: Section, other: Section, method: str) -> tuple[Any, ...] | None:
    """The longest budget at which both confirmed a method, else the longest at which both have a result of it.

    None where they share none.
    """
    for sides in ((one.confirmed, other.confirmed), (_done(one), _done(other))):
        a, b = (set(map(budget_of, rows[rows["method"].eq(method)].to_dict("records"))) for rows in sides)
        if a & b:
            return max(a & b)
    return None


def _done(section: Section) -> pd.DataFrame:
    return section.configurations[section.configurations["seeds"].gt(0)]


def _best(section: Section, method: str, budget: tuple[Any, ...] | None) -> dict[str, Any] | None:
    """The lowest of a method at a budget (None: at any), of the confirmed ones where there are any."""
    for found in (section.confirmed, section.searched):
        mine = found[found["method"].eq(method)]
        if budget is not None:
            mine = mine[same_budget(mine, dict(zip(BUDGET, budget, strict=True)))]
        if len(mine):
            return dict(mine.sort_values("fid_mean", kind="stable").iloc[0])
    return None


def _table(one: Section, other: Section, a: Path, b: Path, number: int) -> Table:
    frame = rows(one, other)
    columns = (
        Column("what", lambda row: words.text(row["what"]), numeric=False),
        Column("in A", lambda row: words.text(row["a_configuration"]), numeric=False),
        *_steps(frame, "steps", "a"),
        Column("seeds", lambda row: str(row["a_seeds"])),
        Column(f"A: {one.fid_name}", lambda row: words.spread(row["a_fid_mean"], row["a_fid_std"])),
        Column("in B", lambda row: words.text(row["b_configuration"]), numeric=False),
        *_steps(frame, "steps in B", "b"),
        Column("seeds in B", lambda row: str(row["b_seeds"])),
        Column(f"B: {one.fid_name}", lambda row: words.spread(row["b_fid_mean"], row["b_fid_std"])),
        Column("B minus A", lambda row: words.interval(row, "difference", row["a_fid_mean"])),
        Column("verdict on B", lambda row: words.text(row["verdict"]), numeric=False),
        Column("train time A", lambda row: words.duration(row["a_train_s"])),
        Column("train time B", lambda row: words.duration(row["b_train_s"])),
    )
    caption = (
        f"A: {a}. B: {b}. {one.title}. B minus A with Welch's interval at {words.percent(CONFIDENCE)}, all rows and "
        "what the best were picked from together; one seed or a search trial is not judged. “No difference shown” is "
        "no proof of equality. Seconds are of the machines that ran the sweeps."
    )
    name = "compare" if number == 0 else f"compare_{number}"
    return Table(
        name, f"{one.title}: A and B", caption, frame, columns, "No configuration has a result in both sweeps."
    )


def _steps(frame: pd.DataFrame, heading: str, side: str) -> tuple[Column, ...]:
    """The column of a side's steps, where several budgets stand in the table."""
    if frame.empty or pd.concat([frame[f"{name}_total_steps"] for name in SIDES]).nunique() < 2:
        return ()
    return (Column(heading, lambda row: words.integer(row[f"{side}_total_steps"])),)


def _task(section: Section) -> tuple[str, str, str, str]:
    return section.protocol_text, section.model, section.dataset, section.variant

"""The comparable parts of a results folder, and what each part says.

Two FIDs are comparable where protocol, model, data set and variant are the same: one Section each, and no table,
figure or ranking ever joins two sections. What trials are compared by while they train may be under a protocol of its
own: `early_fid`, which has its own figures and tables. Within a section, configurations come from two stages:

    confirm   one row per configuration: mean and standard deviation over seeds, and a verdict against dense
    search    (and `single`) one row per trial, one seed each: a value, no spread, no claim

A confirmed row never pools the search trial that made it a winner: that one was picked for being low.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats
from analysis.load import TASK, Records

CONFIDENCE = 0.95
DENSE = "dense"
BUDGET = ["total_steps", "batch_size"]  # trials of another one are held against nothing
GOT_INTERVAL = (stats.NO_DIFFERENCE, "lower", "higher")

# Facts that are the same in every seed of a configuration.
SAME = [
    "configuration", "stage", "method", "sparsity", "prune_ratio", "update_interval_steps", "allocation",
    "other_settings", "total_steps", "batch_size", "world_size", "params_total", "params_active",
    "flops_inference_true", "flops_inference_paper", "flops_train_true", "flops_train_paper",
    "model", "dataset", "protocol",
]  # fmt: skip
RATIOS = {
    "params_ratio": ("params_active", "params_total"),
    "flops_inference_ratio": ("flops_inference_true", "flops_inference_dense_true"),
    "flops_inference_paper_ratio": ("flops_inference_paper", "flops_inference_dense_paper"),
    "flops_train_ratio": ("flops_train_true", "flops_train_dense_true"),
    "flops_train_paper_ratio": ("flops_train_paper", "flops_train_dense_paper"),
}


@dataclass(frozen=True)
class Section:
    """One protocol, model, data set and variant. Columns of `trials` and `reports`: analysis.load."""

    protocol_text: str
    model: str
    dataset: str
    trials: pd.DataFrame
    reports: pd.DataFrame
    variant: str = ""  # analysis.load: class-conditional, a part of the data
    evaluations: pd.DataFrame = field(default_factory=pd.DataFrame)  # of this section's trials, under other protocols

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """The protocol's fields; `{"protocol": text}` where the text is not a JSON object."""
        return _fields(self.protocol_text)

    @property
    def early_name(self) -> str:
        """Of `early_fid`: `fid_name`, or with the samples and steps of the intermediate protocol where there is one."""
        early = self.early_protocol
        if early is None:
            return self.fid_name
        generated, steps = early.get("generated"), early.get("ddim_steps")
        whole = isinstance(generated, int) and isinstance(steps, int)
        how = f"{generated:,} samples, {steps:,} DDIM steps" if whole else "another protocol"
        return f"intermediate {self.fid_name}, {how}"

    @cached_property
    def early_protocol(self) -> dict[str, Any] | None:
        """The protocol of `early_fid` where it is another one than that of the results, and of most trials here."""
        text = _usual(self.trials["intermediate_protocol"])
        return None if text is None else _fields(text)

    @property
    def early_text(self) -> str:
        """The text of the protocol of `early_fid`."""
        return _usual(self.trials["intermediate_protocol"]) or self.protocol_text

    @property
    def title(self) -> str:
        """`hershey · chirodiff · FID (stroke_stats)`, and the variant where it is not the usual one."""
        return " · ".join(part for part in (self.dataset, self.model, self.variant, self.fid_name) if part)

    @property
    def extractor(self) -> str:
        return str(self.protocol.get("extractor", "unknown extractor"))

    @property
    def fid_name(self) -> str:
        """`FID` for Inception's features as in the papers, else `FID (<extractor>)`: another number altogether."""
        return "FID" if self.extractor == "inception" else f"FID ({self.extractor})"

    @property
    def kid_name(self) -> str:
        return "KID" if self.extractor == "inception" else f"KID ({self.extractor})"

    @cached_property
    def configurations(self) -> pd.DataFrame:
        """One row per confirmed configuration and per trial of the other stages, results or not.

        SAME, RATIOS and: trial_id (search only), seeds (results), seeds_started, seeds_failed, fid_mean, fid_std,
        fid_values (list), kid_mean, kid_std, density, train_s (mean), train_s_ratio (per step, to the dense row of the
        stage), fid_difference, fid_difference_low, fid_difference_high, verdict (confirmed sparse rows: against dense).
        Ordered: confirmed before search, dense first, then by FID.
        """
        confirmed = self.trials["stage"].eq("confirm")
        groups = self.trials[confirmed].groupby("configuration", sort=True)
        many, alone = pd.DataFrame([_aggregate(group) for _, group in groups]), _alone(self.trials[~confirmed])
        rows = _against_dense(pd.concat([frame for frame in (many, alone) if len(frame)], ignore_index=True))
        order = {"confirm": 0, "single": 1, "search": 2}
        rank = rows.assign(_stage=rows["stage"].map(order).fillna(3), _sparse=rows["method"].ne(DENSE))
        rank = rank.sort_values(
            ["_stage", "_sparse", "fid_mean", "method", "sparsity"], kind="stable", ignore_index=True
        )
        return rank.drop(columns=["_stage", "_sparse"])

    @cached_property
    def confirmed(self) -> pd.DataFrame:
        """Configurations of the confirm stage that have at least one result."""
        rows = self.configurations
        return rows[rows["stage"].eq("confirm") & rows["seeds"].gt(0)]

    @cached_property
    def searched(self) -> pd.DataFrame:
        """Trials of the other stages that have a result."""
        rows = self.configurations
        return rows[rows["stage"].ne("confirm") & rows["seeds"].gt(0)]

    @cached_property
    def ranked(self) -> pd.DataFrame:
        """What "best" is picked from: the confirmed results, or the search's where no sparse one is confirmed."""
        return self.confirmed if self.confirmed["method"].ne(DENSE).any() else self.searched

    @cached_property
    def comparable(self) -> pd.DataFrame:
        """`ranked` at one budget: the longest that dense and something sparse have, else the longest of these.

        Not that of the lowest FID: 40,000 steps would make a best one that dense of 400 is no match for.
        """
        rows = self.ranked
        is_dense = rows["method"].eq(DENSE)
        sparse, dense = (set(found.groupby(BUDGET).groups) for found in (rows[~is_dense], rows[is_dense]))
        budget = max(sparse & dense or sparse or dense, default=None)
        return rows if budget is None else rows[same_budget(rows, dict(zip(BUDGET, budget, strict=True)))]

    @property
    def dense(self) -> dict[str, Any] | None:
        """What `best` is held against: `dense_of` it, else the dense configuration with the lowest FID of another
        budget, in the stage of `ranked` where there is one."""
        if (best := self.best) and (found := self.dense_of(best)):
            return found
        for stage in (self.ranked, self.confirmed, self.searched):
            if found := _lowest(stage[stage["method"].eq(DENSE)]):
                return found
        return None

    def dense_of(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The dense configuration with the lowest FID at the budget of `row`, in the stage of `ranked` where there is
        one: the only dense that `row` may be held against."""
        for stage in (self.ranked, self.confirmed, self.searched):
            rows = stage[stage["method"].eq(DENSE)]
            if found := _lowest(rows[same_budget(rows, row)]):
                return found
        return None

    @property
    def best(self) -> dict[str, Any] | None:
        """The sparse configuration with the lowest (mean) FID of `comparable`."""
        return _lowest(self.comparable[self.comparable["method"].ne(DENSE)])

    @property
    def cheapest_without_difference(self) -> dict[str, Any] | None:
        """The confirmed sparse configuration with fewest inference FLOPs that is not shown to be worse than dense, of
        the budget of `best`."""
        rows = self.comparable[self.comparable["verdict"].isin([stats.NO_DIFFERENCE, "lower"])]
        return None if rows.empty else dict(rows.sort_values(["flops_inference_true", "fid_mean"]).iloc[0])

    @property
    def comparisons(self) -> int:
        """How many pairs of confirmed configurations, sparse and dense, are judged at once."""
        return _pairs(self.confirmed)

    def methods(self) -> list[str]:
        """All methods of this section, dense first."""
        return sorted(self.trials["method"].unique(), key=lambda name: (name != DENSE, name))


def split(records: Records) -> list[Section]:
    """The sections of a results folder, the one with most trials first."""
    sections = []
    for (protocol, model, dataset, variant), trials in records.trials.groupby(TASK, dropna=False):
        reports, again = (
            rows[rows["trial_id"].isin(trials["trial_id"])].reset_index(drop=True)
            for rows in (records.reports, records.evaluations)
        )
        trials, reports = (_one_early_protocol(rows, trials) for rows in (trials, reports))
        sections.append(Section(protocol, model, dataset, trials, reports, variant, again))
    return sorted(sections, key=lambda section: -len(section.trials))


def budget_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of BUDGET, by which `groupby(BUDGET)` names its groups."""
    return tuple(row[name] for name in BUDGET)


def same_budget(rows: pd.DataFrame, row: Mapping[str, Any]) -> pd.Series:
    """Which of `rows` have the budget of `row`."""
    return rows[BUDGET].eq(list(budget_of(row))).all(axis=1)


def usual_steps(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials of the steps that most of them have, of equals the longest."""
    counts = trials["total_steps"].value_counts()
    return trials[trials["total_steps"].eq(counts[counts.eq(counts.max())].index.max())]


def _fields(protocol: str) -> dict[str, Any]:
    try:
        fields = json.loads(protocol)
    except ValueError:
        fields = None
    return fields if isinstance(fields, dict) else {"protocol": protocol}


def _usual(protocols: pd.Series) -> str | None:
    """The intermediate protocol of most trials, None where that is none."""
    counts = protocols.fillna("").value_counts()
    return str(counts.index[0]) or None if len(counts) else None


def _one_early_protocol(rows: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """`rows` with `early_fid` under one protocol: that of most trials; the others, of another sweep, have none."""
    usual = _usual(trials["intermediate_protocol"])
    return rows.assign(early_fid=rows["early_fid"].where(rows["intermediate_protocol"].fillna("").eq(usual or "")))


def _aggregate(group: pd.DataFrame) -> dict[str, Any]:
    """A confirmed configuration: its trials as one row."""
    # A seed counts once, should two trials of one configuration share it.
    done = group[group["result_fid"].notna()].drop_duplicates("seed", keep="last")
    facts = group.iloc[0]
    fid, kid = stats.sample(done["result_fid"]), stats.sample(done["result_kid"].dropna())
    return {
        **{name: facts[name] for name in SAME},
        **{name: _ratio(facts[above], facts[below]) for name, (above, below) in RATIOS.items()},
        "trial_id": None,
        "seeds": fid.n,
        "seeds_started": group["seed"].nunique(),
        "seeds_failed": int((group["state"].eq("FAILED") | group["diverged"]).sum()),
        "fid_mean": fid.mean,
        "fid_std": fid.std,
        "fid_values": done["result_fid"].tolist(),
        "kid_mean": kid.mean,
        "kid_std": kid.std,
        "density": done["density"].mean(),
        "train_s": done["train_s"].mean(),
    }


def _alone(trials: pd.DataFrame) -> pd.DataFrame:
    """A row per trial of the other stages, columns as `_aggregate` has them; all at once, for a search may be long."""
    trials = trials.sort_values("trial_id", kind="stable", ignore_index=True)
    done = trials["result_fid"].notna()
    ratios = {
        name: (trials[above] / trials[below].where(trials[below].ne(0))).astype("float64")
        for name, (above, below) in RATIOS.items()
    }
    return trials[SAME].assign(
        **ratios,
        trial_id=trials["trial_id"],
        seeds=done.astype("int64"),
        seeds_started=1,
        seeds_failed=(trials["state"].eq("FAILED") | trials["diverged"]).astype("int64"),
        fid_mean=trials["result_fid"],
        fid_std=np.nan,
        fid_values=[[value] if ok else [] for value, ok in zip(trials["result_fid"], done, strict=True)],
        kid_mean=trials["result_kid"].where(done),
        kid_std=np.nan,
        density=trials["density"].where(done).astype("float64"),
        train_s=trials["train_s"].where(done).astype("float64"),
    )


def _against_dense(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with the difference from the dense configuration of their own budget, and the ratio of seconds to it."""
    done = rows[rows["seeds"].gt(0)]
    dense = done[done["method"].eq(DENSE)]
    of_stage = {stage: _lowest(found) for stage, found in dense.groupby("stage")}
    of_budget = {key: _lowest(found) for key, found in dense.groupby(["stage", *BUDGET])}
    confidence = stats.simultaneous(CONFIDENCE, _pairs(done[done["stage"].eq("confirm")]))
    verdicts = []
    for row in rows.to_dict("records"):
        judge = of_budget.get((row["stage"], *budget_of(row)))
        base = judge or of_stage.get(row["stage"])
        verdict: dict[str, Any] = {"train_s_ratio": _seconds_ratio(row, base) if base else np.nan}
        verdict |= dict.fromkeys(("fid_difference", "fid_difference_low", "fid_difference_high"), np.nan)
        verdict["verdict"] = None
        if judge and row["stage"] == "confirm" and row["method"] != DENSE and row["seeds"]:
            gap = stats.welch(row["fid_values"], judge["fid_values"], confidence)
            verdict |= {"fid_difference": gap.estimate, "fid_difference_low": gap.low, "fid_difference_high": gap.high}
            verdict["verdict"] = gap.verdict
        verdicts.append(verdict)
    return pd.concat([rows, pd.DataFrame(verdicts)], axis=1)


def _pairs(confirmed: pd.DataFrame) -> int:
    """Sparse configurations times dense ones of their budget, those with two seeds.

    The dense that judges is the lowest of its budget, picked by the seeds that then judge: all that it was picked from
    count. Of equals, three sparse and four dense ones with ten seeds each, in 6.4 of 100 sections a sparse one was said
    to be higher where the sparse ones alone were counted, and in 1.8 where all pairs are.
    """
    judged = confirmed[confirmed["seeds"].gt(1)]
    dense = judged["method"].eq(DENSE)
    return sum(int(mine.sum()) * int((~mine).sum()) for _, mine in dense.groupby([judged[name] for name in BUDGET]))


def _lowest(rows: pd.DataFrame) -> dict[str, Any] | None:
    rows = rows[rows["fid_mean"].notna()]
    return None if rows.empty else dict(rows.sort_values("fid_mean", kind="stable").iloc[0])


def _seconds_ratio(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Measured seconds a step over dense's; NaN where batch or workers differ, for then it is not sparsity's doing."""
    if any(row[name] != dense[name] for name in ("batch_size", "world_size")):
        return float("nan")
    return _ratio(_ratio(row["train_s"], row["total_steps"]), _ratio(dense["train_s"], dense["total_steps"]))


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below and not pd.isna(above) and not pd.isna(below) else float("nan")

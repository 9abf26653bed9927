"""Records -> tidy tables. Works on a sweep that is still running, and past files that are damaged.

`load(results)` gives one row per report. Its columns are those of raysparse.results (Facts, Outcome, Report; units in
their names), without `samples_png` and `layer_density`, which are large and read where they are needed. `fid` and `kid`
of a diverged report are NaN, whatever stand-in was written for the trial scheduler. Added are

    path            str    the record file
    configuration   str    ten hex digits: the same for trials that differ only in seed, folders and threads
    other_settings  str    settings beside method, S, p, ΔTe and steps that vary among the trials that share protocol,
                           model and data set, `name=value, ...`

`read(results)` gives that table, one row per trial, and the warnings. A trial's row has Facts, Outcome and

    reports         int    how many there are
    step, train_loss, validation_loss, fid, kid, kid_std, density, topology_updates, train_s, evaluate_s,
    peak_memory_bytes, flops_spent_paper, flops_spent_true      of the last report (NaN without one)
    diverged        bool   the last report says so
    full_budget     bool   the last report is at total_steps (or later) and the trial neither failed nor diverged
    result_fid      float  `fid` of the last report where full_budget, else NaN: the last value, never the smallest
                           over the reports, which would reward noise and many looks
    result_kid      float  likewise
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from raysparse import results as records
from raysparse.errors import UsageError

FACTS = [field.name for field in dataclasses.fields(records.Facts)]
OUTCOME = [field.name for field in dataclasses.fields(records.Outcome)]
LARGE = ("samples_png", "layer_density")
REPORT = [field.name for field in dataclasses.fields(records.Report) if field.name not in LARGE]
OPTIONAL = ("allocation", "prune_ratio", "update_interval_steps")  # facts that may be null

# Settings that say where and how fast a trial runs, never what it computes (left out of a trial's id as well).
PLACES = (
    ("seed",),
    ("data", "source"),
    ("data", "root"),
    ("evaluate", "weights"),
    ("evaluate", "runtime"),
    ("train", "threads"),
    ("train", "runtime"),
)
UNREADABLE = "(config)"  # stands for all settings where the text is no JSON object
# Settings that have a column of their own.
SHOWN = ("sparse.method", "sparse.sparsity", "sparse.prune_ratio", "sparse.update_interval", "train.steps")


@dataclass(frozen=True)
class Records:
    """What a results folder holds; columns as this module's head says."""

    results: Path
    reports: pd.DataFrame
    trials: pd.DataFrame
    warnings: tuple[str, ...]


def load(results: Path | str) -> pd.DataFrame:
    """One row per report (see this module's head). UsageError where there is no readable record."""
    return read(Path(results)).reports


def read(results: Path) -> Records:
    """All records of a results folder. UsageError where none is readable; a damaged file becomes a warning."""
    paths = records.record_paths(results)
    tables, warnings = [], []
    for path in paths:
        try:
            tables.append(_read_one(path))
        except UsageError as error:
            warnings.append(f"left out: {error}")
    if not tables:
        if warnings:
            raise UsageError(f"{results / 'records'} holds no readable record:\n" + "\n".join(warnings))
        raise UsageError(f"{results / 'records'} is empty: no trial of this sweep has started yet")
    rows = pa.concat_tables(tables).to_pandas()
    rows, doubled = _last_wins(rows)
    warnings += doubled
    rows = _measured(_with_configurations(rows))
    trials = _trials(rows)
    reports = rows[rows["step"].notna()].astype({"step": "int64"}).reset_index(drop=True)
    return Records(results, reports, trials, tuple(warnings))


def samples_png(path: Path) -> bytes | None:
    """The sample grid of a record's last report that has one."""
    column = records.read_trial(path)["samples_png"]
    grids = [grid for grid in column.to_pylist() if grid]
    return grids[-1] if grids else None


def _read_one(path: Path) -> pa.Table:
    try:
        table = records.read_trial(path)
    except pa.ArrowException as error:  # right names, wrong types
        raise UsageError(f"{path} is not a raysparse record: {error}") from error
    if table.num_rows == 0:
        raise UsageError(f"{path} has no rows")
    for name in [*(name for name in FACTS if name not in OPTIONAL), "state"]:
        if table[name].null_count:
            raise UsageError(f"{path} has rows without {name}")
    if len(pc.unique(table["trial_id"])) > 1:
        raise UsageError(f"{path} holds several trials; a record file is one trial")
    table = table.select(FACTS + OUTCOME + REPORT)
    return table.append_column("path", pa.repeat(pa.scalar(str(path)), table.num_rows))


def _last_wins(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Each trial from one file (the later one that reports more), each step once (the later row), by step."""
    warnings = []
    files = rows.groupby(["trial_id", "path"], sort=True)["step"].max().fillna(-1).reset_index()
    kept = files.sort_values("step", kind="stable").drop_duplicates("trial_id", keep="last")
    if len(kept) < len(files):
        left = files[~files["path"].isin(kept["path"])]
        warnings = [f"left out: {p} repeats a trial that another file has" for p in left["path"]]
        rows = rows[rows["path"].isin(kept["path"])]
    rows = rows.drop_duplicates(["trial_id", "step"], keep="last")
    started = set(rows.loc[rows["step"].notna(), "trial_id"])
    rows = rows[rows["step"].notna() | ~rows["trial_id"].isin(started)]
    return rows.sort_values(["trial_id", "step"], kind="stable", ignore_index=True), warnings


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Numbers that are no measurements as NaN: infinities, and the stand-ins that a diverged trial reports."""
    floats = rows.select_dtypes("float64")
    rows = rows.assign(**floats.where(np.isfinite(floats)))
    rows.loc[rows["diverged"].eq(True), ["fid", "kid", "kid_std"]] = np.nan
    return rows


def _with_configurations(rows: pd.DataFrame) -> pd.DataFrame:
    settings = {text: _settings(text) for text in rows["config"].unique()}
    keys = {text: hashlib.sha256(json.dumps(flat, sort_keys=True).encode()) for text, flat in settings.items()}
    others: dict[str, str] = {}
    for _, texts in rows.drop_duplicates("config").groupby(["protocol", "model", "dataset"])["config"]:
        comparable = [settings[text] for text in texts]
        varying = {name for name in {name for flat in comparable for name in flat} if _varies(name, comparable)}
        for text, flat in zip(texts, comparable, strict=True):
            others[text] = ", ".join(f"{name}={_compact(flat[name])}" for name in sorted(varying & set(flat)))
    return rows.assign(
        configuration=rows["config"].map({text: key.hexdigest()[:10] for text, key in keys.items()}),
        other_settings=rows["config"].map(others),
    )


def _varies(name: str, settings: list[dict[str, Any]]) -> bool:
    if name in SHOWN:
        return False
    # A method without allocation is no second value of it; a model without an option is.
    values = {_compact(flat[name]) if name in flat else None for flat in settings if UNREADABLE not in flat}
    return len(values - {None} if name.startswith("sparse.") else values) > 1


def _settings(text: str) -> dict[str, Any]:
    """A trial's configuration as {dotted name: value}, without seed and places; settings that are None are left out."""
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        return {UNREADABLE: text}
    flat = _flatten(config)
    return {name: value for name, value in flat.items() if name not in {".".join(place) for place in PLACES}}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _trials(rows: pd.DataFrame) -> pd.DataFrame:
    counts = rows.groupby("trial_id")["step"].count()
    trials = rows.drop_duplicates("trial_id", keep="last").reset_index(drop=True)
    trials["reports"] = trials["trial_id"].map(counts)
    trials["state_reason"] = trials["state_reason"].fillna(trials["reason"])
    trials["diverged"] = trials["diverged"].eq(True)
    trials["full_budget"] = (
        trials["step"].ge(trials["total_steps"]) & trials["state"].ne("FAILED") & ~trials["diverged"]
    )
    for name in ("fid", "kid"):
        trials[f"result_{name}"] = trials[name].where(trials["full_budget"]).astype("float64")
    return trials

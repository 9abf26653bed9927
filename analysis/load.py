"""Records -> tidy tables. Works on a sweep that is still running, and past files that are damaged.

`load(results)` gives one row per report. Its columns are those of raysparse.results (Facts, Outcome, Report; units in
their names: _steps, _s, _bytes; FLOPs are floating-point operations, `_true` counted, `_paper` as the papers count),
without the large ones (LARGE), which are read where they are needed. Text is Python's own strings, dtype object. `fid`
and `kid` of a diverged report are NaN, whatever stand-in was written for the trial scheduler. Added are

    path            str    the record file
    early_fid       float  what trials are compared by while they train: `intermediate_fid` where the trial has an
                           intermediate protocol, at its last step too, else `fid`. Never compared with a `fid`.
    configuration   str    ten hex digits: the same for trials that differ only in seed, folders and threads
    other_settings  str    settings beside method, S, p, ΔTe and steps that vary among the trials that share protocol,
                           model, data set and variant, `name=value, ...`; a default too, where the record says it
    variant         str    what else makes another task of the same data set: "class-conditional", "first 12500
                           training examples"; empty for the usual one

`read(results)` gives that table, one row per trial, and the warnings. A trial's row has Facts, Outcome and

    reports         int    how many there are
    step, train_loss, validation_loss, fid, early_fid, kid, kid_std, density, topology_updates, train_s, compile_s,
    evaluate_s, peak_memory_bytes, flops_spent_paper, flops_spent_true      of the last report (NaN without one)
    diverged        bool   the last report says so
    full_budget     bool   the last report is at total_steps (or later) and the trial neither failed nor diverged
    result_fid      float  `fid` of the last report where full_budget, else NaN: the last value, never the smallest
                           over the reports, which would reward noise and many looks
    result_kid      float  likewise

and `evaluations`, one row per model that `raysparse evaluate` measured again under another protocol: the columns of a
report, `protocol` being that of the new measurement and stage and configuration those of the trial it belongs to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from raysparse import results as records
from raysparse.errors import UsageError

FACTS = [field.name for field in dataclasses.fields(records.Facts)]
OUTCOME = [field.name for field in dataclasses.fields(records.Outcome)]
LARGE = ("samples_png", "layer_density", "mask_sample")
REPORT = [field.name for field in dataclasses.fields(records.Report) if field.name not in LARGE]
# Facts that may be null.
OPTIONAL = ("allocation", "prune_ratio", "update_interval_steps", "intermediate_protocol", "defaults")
TASK = ["protocol", "model", "dataset", "variant"]  # where all of these are equal, two FIDs are comparable
EVALUATIONS = "evaluations"  # the folder of what `raysparse evaluate` measured

# Settings that say where and how fast a trial runs, never what it computes (left out of a trial's id as well).
PLACES = (
    "seed",
    "data.source",
    "data.root",
    "evaluate.weights",
    "evaluate.runtime",
    "train.threads",
    "train.runtime",
    "train.cuda_graph",
)
# Settings that came later, and what was done before: at that value they are as if unknown (as in a trial's id).
LATER = {"evaluate.intermediate": None, "evaluate.validation_examples": 1_024, "evaluate.precision": None}
UNREADABLE = "(config)"  # stands for all settings where the text is no JSON object
# Settings that have a column of their own.
ALWAYS_THERE = ("sparse.allocation", "sparse.prune_schedule", "sparse.update_end_fraction")  # where a method has them
SHOWN = ("sparse.method", "sparse.sparsity", "sparse.prune_ratio", "sparse.update_interval", "train.steps")


@dataclass(frozen=True)
class Records:
    """What one or several results folders hold; columns as this module's head says."""

    folders: tuple[Path, ...]
    reports: pd.DataFrame
    trials: pd.DataFrame
    evaluations: pd.DataFrame
    warnings: tuple[str, ...]


def load(*results: Path | str) -> pd.DataFrame:
    """One row per report (see this module's head). UsageError where there is no readable record."""
    return read(*(Path(folder) for folder in results)).reports


def read(*folders: Path) -> Records:
    """All records of results folders. UsageError where none is readable; a damaged file becomes a warning."""
    folders = tuple(dict.fromkeys(folders))
    found, warnings = _read_all(path for folder in folders for path in records.record_paths(folder))
    places = " and ".join(str(folder / "records") for folder in folders)
    if not found:
        if warnings:
            raise UsageError(f"{places} holds no readable record:\n" + "\n".join(warnings))
        raise UsageError(f"{places} is empty: no trial of this sweep has started yet")
    rows, doubled = _last_wins(_rows(found))
    rows = _measured(_with_configurations(rows))
    trials = _trials(rows)
    reports = rows[rows["step"].notna()].astype({"step": "int64"}).reset_index(drop=True)
    again, damaged = _read_all(path for folder in folders for path in records.parquet_files(folder / EVALUATIONS))
    return Records(folders, reports, trials, _evaluations(again, trials), tuple(warnings + doubled + damaged))


def samples_png(path: Path) -> bytes | None:
    """The sample grid of a record's last report that has one."""
    grids = [grid for grid in column(path, "samples_png") if grid]
    return grids[-1] if grids else None


def column(path: Path, name: str) -> list[Any]:
    """One of the large columns of a record, a value per report. UsageError where it cannot be read (any more)."""
    return list(records.read_trial(path, [name])[name].to_pylist())


def _read_all(paths: Iterable[Path]) -> tuple[list[pa.Table], list[str]]:
    tables, warnings = [], []
    # Threads, for pyarrow reads without Python's lock: a thousand files are a third of a large report's time.
    with ThreadPoolExecutor() as readers:
        for found in readers.map(_read_or_why, paths):
            if isinstance(found, UsageError):
                warnings.append(f"left out: {found}")
            else:
                tables.append(found)
    return tables, warnings


def _read_or_why(path: Path) -> pa.Table | UsageError:
    try:
        return _read_one(path)
    except UsageError as error:
        return error


def _read_one(path: Path) -> pa.Table:
    try:
        table = records.read_trial(path, FACTS + OUTCOME + REPORT)
    except pa.ArrowException as error:  # right names, wrong types
        raise UsageError(f"{path} is not a raysparse record: {error}") from error
    if table.num_rows == 0:
        raise UsageError(f"{path} has no rows")
    for name in [*(name for name in FACTS if name not in OPTIONAL), "state"]:
        if table[name].null_count:
            raise UsageError(f"{path} has rows without {name}")
    if len(table["trial_id"].unique()) > 1:
        raise UsageError(f"{path} holds several trials; a record file is one trial")
    return table.append_column("path", pa.repeat(pa.scalar(str(path)), table.num_rows))


def _rows(tables: list[pa.Table]) -> pd.DataFrame:
    """All rows; what a file repeats in each row is made once, else a config of 2 kB would be there 100,000 times."""
    once = [*FACTS, *OUTCOME, "path"]
    heads = pa.concat_tables([table.select(once).slice(table.num_rows - 1) for table in tables]).to_pandas()
    rows = pa.concat_tables([table.select(REPORT) for table in tables]).to_pandas()
    heads = _with_plain_text(heads)
    heads = heads.loc[np.repeat(heads.index, [table.num_rows for table in tables])].reset_index(drop=True)
    return pd.concat([heads, rows], axis=1)


def _with_plain_text(frame: pd.DataFrame) -> pd.DataFrame:
    """Text as Python's own strings, of which rows share one: Arrow copies it into each row that is picked."""
    return frame.astype(dict.fromkeys(frame.select_dtypes("str"), object))


def _evaluations(tables: list[pa.Table], trials: pd.DataFrame) -> pd.DataFrame:
    known = trials.set_index("trial_id")[["stage", "configuration", "other_settings", "variant"]]
    if not tables:
        return pd.DataFrame(columns=[*FACTS, *OUTCOME, *REPORT, "path", *known.columns[1:]])
    rows = _measured(_rows(tables).drop(columns="stage"))
    return rows[rows["step"].notna()].join(known, on="trial_id", how="inner").reset_index(drop=True)


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
    rows.loc[rows["diverged"].eq(True), ["fid", "intermediate_fid", "kid", "kid_std"]] = np.nan
    return rows.assign(early_fid=rows["fid"].where(rows["intermediate_protocol"].isna(), rows["intermediate_fid"]))


def _with_configurations(rows: pd.DataFrame) -> pd.DataFrame:
    settings = {text: _settings(text) for text in rows["config"].unique()}
    keys = {text: _key(flat) for text, flat in settings.items()}
    rows = rows.assign(
        configuration=rows["config"].map(keys),
        variant=rows["config"].map({text: _variant(flat) for text, flat in settings.items()}),
    )
    defaults = _defaults(rows)
    others: dict[str, str] = {}
    for _, texts in rows.drop_duplicates("config").groupby(TASK)["config"]:
        comparable = [settings[text] for text in texts]
        varying = sorted(name for name in {name for flat in comparable for name in flat} if _varies(name, comparable))
        for text, flat in zip(texts, comparable, strict=True):
            known = defaults[keys[text]] | flat
            others[text] = ", ".join(f"{name}={_compact(known[name])}" for name in varying if name in known)
    return _with_plain_text(rows.assign(other_settings=rows["config"].map(others)))


def _key(flat: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:10]


def _defaults(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """configuration -> the settings that its config leaves out for they have their default, of all records of it.

    Beside a trial with another value they are told. Records of earlier versions do not say them.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, text in rows[["configuration", "defaults"]].drop_duplicates().itertuples(index=False):
        told = _object(text) if isinstance(text, str) else None
        found.setdefault(key, {name: value for name, value in LATER.items() if value is not None}).update(told or {})
    return found


def _variant(flat: dict[str, Any]) -> str:
    """What makes it another task: dense of a class-conditional model, or of a part of the data, is no baseline here.

    Conditional is a model that is told classes (`num_classes`) or a data set that gives them (`conditional`).
    """
    told = []
    if flat.get("model.options.num_classes") or flat.get("data.options.conditional") is True:
        told.append("class-conditional")
    count = flat.get("data.train_examples") or flat.get("data.options.train_examples")
    if isinstance(count, int) and count > 0:
        told.append(f"first {count} training examples")
    return ", ".join(told)


def _varies(name: str, settings: list[dict[str, Any]]) -> bool:
    if name in SHOWN:
        return False
    # A method without allocation is no second value of it; a model without an option is, and so is a later setting of a
    # method, which is not there at its default.
    values = {_compact(flat[name]) if name in flat else None for flat in settings if UNREADABLE not in flat}
    return len(values - {None} if name in ALWAYS_THERE else values) > 1


def _settings(text: str) -> dict[str, Any]:
    """A trial's configuration as {dotted name: value}: what its id is made of, without the seed and what is None."""
    config = _object(text)
    if config is None:
        return {UNREADABLE: text}
    flat = _flatten(config)
    if "first_stage.sha256" in flat:
        flat.pop("first_stage.weights", None)  # then the hash says which they are
    known = {name: value for name, value in flat.items() if name not in PLACES}
    return {name: value for name, value in known.items() if name not in LATER or value != LATER[name]}


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


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

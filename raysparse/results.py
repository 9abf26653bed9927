"""The one Parquet schema: a file per trial, a row per report, trial facts repeated in each row.

A sweep's records live in `RESULTS/records/<trial_id>.parquet`. One writer per trial (the driver of a sweep, or
`raysparse train`) rewrites the file atomically after each report, so a reader always sees whole files and a sweep
can be analysed while it runs. Imports neither torch nor ray: the analysis reads records where both are absent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from raysparse.errors import UsageError
from raysparse.files import atomic_path

STATES = ("RUNNING", "COMPLETED", "STOPPED", "FAILED")
STAGES = ("search", "confirm", "single")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a trial apart from its reports; every field is a column, None is a null."""

    sweep: str
    trial_id: str
    stage: str  # one of STAGES; only confirmed results get a mean, a spread and a claim
    method: str
    seed: int
    model: str
    dataset: str
    allocation: str | None
    sparsity: float  # the target S, 0.0 for dense
    prune_ratio: float | None
    update_interval_steps: int | None
    total_steps: int  # the trial's full budget in optimizer steps
    batch_size: int  # examples per optimizer step, over all workers
    world_size: int
    params_total: int
    params_active: int
    flops_inference_paper: float  # one sample, all DDIM steps, the papers' convention (PAPER: Table 1, 2 "Test")
    flops_inference_true: float
    flops_train_paper: float  # the full budget, the papers' convention ("Train")
    flops_train_true: float
    flops_inference_dense_paper: float  # the same trial at S = 0, so that ratios need no dense trial
    flops_inference_dense_true: float
    flops_train_dense_paper: float
    flops_train_dense_true: float
    protocol: str  # JSON of what makes two FIDs comparable; equal text = comparable
    config: str  # JSON of the whole TrialConfig
    versions: str  # JSON: raysparse, python, torch, ray, optuna, ...
    command: str  # what to type to get this record again
    # The protocol of `intermediate_fid`; None: there is none, and each report has a FID under `protocol`
    intermediate_protocol: str | None = None
    # JSON {dotted name: value} of what `config` leaves out, settings at their default; None: recorded before this was
    defaults: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """One evaluation of one trial. `fid` and the losses are finite; a trial that is not reports `diverged`.

    Where the trial has an intermediate protocol, `fid` is None before the last step. The two are never compared.
    """

    step: int  # optimizer steps done
    train_loss: float | None  # mean since the last report
    validation_loss: float | None  # masked EMA weights, fixed noise and timesteps
    fid: float | None  # under the trial's own protocol
    kid: float | None
    kid_std: float | None
    density: float  # achieved, over the maskable weights
    layer_density: str  # JSON {parameter name: density}
    topology_updates: int  # since step 0
    topology_changed: float  # share of active connections replaced since the last report, in [0, 1]
    train_s: float  # seconds in training steps since step 0; evaluation, checkpoints and `compile_s` left out
    evaluate_s: float  # seconds in evaluation since step 0
    peak_memory_bytes: int | None  # since the trial began: a GPU's tensors, else what its process holds of the host
    flops_spent_paper: float  # training FLOPs since step 0
    flops_spent_true: float
    diverged: bool = False
    reason: str | None = None  # why it diverged
    samples_png: bytes | None = None  # a grid of samples from the same noise in every trial with this seed
    mask_sample: str | None = None  # JSON {parameter name: mask bits in hex}, some positions, the same in every trial
    intermediate_fid: float | None = None  # under the trial's intermediate protocol, at the last step too
    compile_s: float | None = None  # seconds in first steps of compiled or recorded networks; None: `train_s` has them


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where a trial stands; repeated in each row, written anew when it changes."""

    state: str = "RUNNING"  # one of STATES
    stopped_at_step: int | None = None  # STOPPED by the scheduler only: the rung
    state_reason: str | None = None


def _arrow_type(hint: Any) -> pa.DataType:
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(), bytes: pa.binary()}[kinds[0]]


def _schema() -> pa.Schema:
    # A trial that failed before its first report has one row with a null step, so report columns are all nullable.
    fields = []
    for part in (Facts, Outcome, Report):
        hints = get_type_hints(part)
        fields += [pa.field(f.name, _arrow_type(hints[f.name])) for f in dataclasses.fields(part)]
    return pa.schema(fields, metadata={b"raysparse_schema": b"1"})


SCHEMA = _schema()
# A file has fifty small columns, and a zstd reader takes 10 µs to set up: 1.7 ms a file, 1.1 so.
COMPRESSION = {name: "zstd" if name in ("layer_density", "mask_sample") else "snappy" for name in SCHEMA.names}
# Columns that records written before them lack.
_LATER = frozenset({"mask_sample", "intermediate_fid", "intermediate_protocol", "compile_s", "defaults"})


def write_trial(results: Path, facts: Facts, outcome: Outcome, reports: Iterable[Report]) -> Path:
    """Write one trial's records to RESULTS/records; see `write_table`."""
    path = results / "records" / f"{facts.trial_id}.parquet"
    write_table(path, facts, outcome, reports)
    return path


def write_table(path: Path, facts: Facts, outcome: Outcome, reports: Iterable[Report]) -> None:
    """Write one trial's rows atomically; the last report of a step wins, steps come out ascending."""
    if outcome.state not in STATES:
        raise ValueError(f"state {outcome.state!r} is none of {STATES}")
    by_step = {report.step: report for report in reports}
    head = dataclasses.asdict(facts) | dataclasses.asdict(outcome)
    empty = {field.name: None for field in dataclasses.fields(Report)}
    rows = [head | dataclasses.asdict(by_step[step]) for step in sorted(by_step)] or [head | empty]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression=COMPRESSION)


def read_trial(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One trial's rows, all columns or those named. UsageError naming the file if it is damaged or of another schema.

    Columns that came later than the file are nulls where Report or Outcome has a default for them.
    """
    try:
        with pq.ParquetFile(path) as file:  # pq.read_table would make a dataset of it: half as much again of the time
            present = set(file.schema_arrow.names)  # made anew at each look
            missing = [name for name in SCHEMA.names if name not in present]
            if needed := [name for name in missing if name not in _LATER]:
                raise UsageError(f"{path} is not a raysparse record: it lacks the columns {', '.join(needed[:5])}")
            names = [name for name in (columns or SCHEMA.names) if name not in missing]
            table = file.read(columns=names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} is not a readable Parquet file ({error}); delete it or restore it") from error
    wanted = _schema_of(tuple(columns or SCHEMA.names))
    if table.schema.equals(wanted):  # the usual case: a cast that changes nothing takes a tenth of the time
        return table
    for name in wanted.names:
        if name in missing:
            table = table.append_column(wanted.field(name), pa.nulls(table.num_rows, wanted.field(name).type))
    return table.select(wanted.names).cast(wanted)


@functools.cache
def _schema_of(columns: tuple[str, ...]) -> pa.Schema:
    return pa.schema([SCHEMA.field(name) for name in columns])


def reports_of(table: pa.Table) -> list[Report]:
    """The reports in one trial's rows, by step; the last row of a step wins."""
    names = [field.name for field in dataclasses.fields(Report)]
    rows = table.select(names).to_pylist()
    by_step = {row["step"]: Report(**row) for row in rows if row["step"] is not None}
    return [by_step[step] for step in sorted(by_step)]


def report_from(values: Mapping[str, Any]) -> Report | None:
    """A Report of the fields among `values` (others are left alone); None where one without a default is absent."""
    known = {field.name: values[field.name] for field in dataclasses.fields(Report) if field.name in values}
    needed = [field.name for field in dataclasses.fields(Report) if field.default is dataclasses.MISSING]
    return Report(**known) if all(name in known for name in needed) else None


def record_paths(results: Path) -> list[Path]:
    """The record files of a results folder, sorted by name."""
    folder = results / "records"
    if not folder.is_dir():
        raise UsageError(f"{results} is not a results folder: it has no folder 'records' (give the folder of a sweep)")
    return parquet_files(folder)


def parquet_files(folder: Path) -> list[Path]:
    """Those of a folder, sorted by name; a pipe of such a name would be waited for without end."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith(".") and path.is_file())

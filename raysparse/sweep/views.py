"""What can be said of a results folder by who only reads it: sweeps, trials, one trial, two side by side.

Reads the journal, the records and the trials' logs. Imports neither ray nor torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from raysparse import results as records
from raysparse import space
from raysparse.asha import Asha
from raysparse.errors import UsageError, unknown
from raysparse.space import Sweep
from raysparse.sweep import control, folder, objectives, trial_log
from raysparse.sweep.board import Board, Row
from raysparse.sweep.journal import read
from raysparse.train import folders

Facts = dict[str, Any]  # plain data for JSON
SETTINGS = ("sparsity", "prune_ratio", "update_interval")


@dataclasses.dataclass(frozen=True)
class View:
    """A results folder: of a sweep, or of trials without one (`raysparse train`), whose board is made of records."""

    results: Path
    board: Board
    sweep: Sweep | None
    driver: control.Driver

    @property
    def name(self) -> str:
        return self.sweep.name if self.sweep else self.results.name

    @property
    def state(self) -> str:
        """running, finished, interrupted (it said so) or gone (its driver was killed); trials: there is no sweep."""
        last = self.board.last
        if self.sweep is None:
            return "trials"
        if self.driver.state == "running":
            return "running"
        if self.board.finished:
            return "finished"
        return "interrupted" if last and last.kind == "interrupted" else "gone"

    @property
    def what_to_do(self) -> str | None:
        """The command that follows from the state; None while it runs."""
        results = shlex.quote(str(self.results))
        if self.state in ("interrupted", "gone"):
            return f"raysparse resume {results}"
        failed = any(row.state == "FAILED" and not row.diverged for row in self.board.rows.values())
        if self.state == "finished":
            return f"raysparse retry {results} --failed" if failed else f"python -m analysis {results}"
        return None


def load(results: Path) -> View:
    """UsageError where the folder holds neither a sweep nor records."""
    if (results / "sweep.json").is_file():
        sweep, _ = folder.load(results)
        board = Board.load(results)
        driver = control.driver(results, board)
        if driver.state != "running":
            board.settle()
        return View(results, board, sweep, driver)
    return View(results, _board_of_records(results), None, control.Driver("none", ""))


def find(root: Path) -> list[Path]:
    """The results folders at and below a folder; UsageError where there is none."""
    if not root.is_dir():
        raise UsageError(f"no folder {root}; give one that holds results, such as results")
    found = []
    for place, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "sweep.json" in files or ("records" in names and any(Path(place, "records").glob("*.parquet"))):
            found.append(Path(place))
            names.clear()
    if not found:
        raise UsageError(f"no results below {root}: a sweep's folder has a sweep.json, other results have records/")
    return found


def pick(board: Board, prefix: str) -> Row:
    """The trial whose id begins so. A hash alone does as well: `a1b2` for rigl-a1b2c3d4e5."""
    names = list(board.rows)
    found = [name for name in names if name == prefix] or [
        name for name in names if name.startswith(prefix) or name.rpartition("-")[2].startswith(prefix)
    ]
    if len(found) == 1 and prefix:
        return board.rows[found[0]]
    if not names:
        raise UsageError(f"there is no trial {prefix!r}: none has begun yet")
    if not found:
        raise UsageError(unknown("trial", prefix, names[:50]))
    shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
    raise UsageError(f"{prefix!r} is the beginning of {len(found)} trials: {shown}; give more of it")


def sweep_facts(view: View) -> Facts:
    """One line of `raysparse ls`."""
    board, resources = view.board, view.sweep.resources if view.sweep else None
    hours = board.busy_s() / 3600
    return {
        "results": str(view.results),
        "name": view.name,
        "state": view.state,
        "driver": view.driver.who or None,
        "stage": board.stage,
        "trials": board.counts(),
        "planned": space.trial_count(view.sweep) if view.sweep else len(board.rows),
        "best": best(list(board.rows.values())),
        "front": [front_facts(row) for row in objectives.front_of(board.rows.values())],
        "begun": _iso(board.first.time) if board.first else None,
        "last_event": _iso(board.last.time) if board.last else None,
        "trial_hours": hours,
        "gpu_hours": hours * resources.workers * resources.gpus_per_worker if resources else None,
        "what_to_do": view.what_to_do,
    }


def trial_facts(row: Row) -> Facts:
    """One line of the table of trials."""
    return {
        "trial_id": row.trial_id,
        "stage": row.stage,
        "method": row.method,
        **{name: row.setting(name) for name in SETTINGS},
        "point": row.point,
        "seed": row.seed,
        "state": row.state,
        "step": row.step,
        "total_steps": row.total_steps,
        "fid": row.fid,
        "intermediate_fid": row.latest if row.intermediate else None,
        "reason": row.reason,
        "stopped_by": row.stopped_by,
    }


def front_facts(row: Row) -> Facts:
    """A trial on the Pareto front."""
    return {"trial_id": row.trial_id, "fid": row.fid, **row.costs}


def best(rows: Sequence[Row]) -> list[Facts]:
    """The best of each method in each stage, by FID: of completed trials, else of the one that came furthest.

    Of the latter `fid` is None where it has an intermediate protocol, and `intermediate_fid` says what is known. FIDs
    are compared only where all that they were measured by and on is the same. Seeds are replicates: a confirmed point
    counts with its mean over them.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.latest is not None and row.state != "FAILED":
            groups.setdefault((row.stage, _measured_by(row), row.method), []).append(row)
    protocols = list(dict.fromkeys(measured for _, measured, _ in groups))
    found = []
    for (stage, measured, method), group in groups.items():
        done = [row for row in group if row.state == "COMPLETED"]
        replicates = [[row] for row in done]
        if stage == "confirm":
            points = dict.fromkeys(json.dumps(row.point, sort_keys=True) for row in done)
            replicates = [[row for row in done if json.dumps(row.point, sort_keys=True) == point] for point in points]
        chosen = min(replicates, key=_mean) if done else [min(group, key=lambda row: (-row.step, row.latest))]
        intermediate = chosen[0].intermediate and not done
        found.append(
            {
                "method": method,
                "stage": stage,
                "trials": [row.trial_id for row in chosen],
                "fid": None if intermediate else _mean(chosen),
                "fids": [row.fid for row in chosen],
                "intermediate_fid": chosen[0].latest if intermediate else None,
                "step": chosen[0].step,
                "state": chosen[0].state,
                "protocol": protocols.index(measured) + 1 if len(protocols) > 1 else None,
            }
        )
    return found


def rungs(board: Board, asha: Asha, total_steps: int) -> dict[float, dict[str, float]]:
    """step of a rung -> trial -> the FID that counts there, as `scheduler.Rungs` has it."""
    steps = asha.rung_steps(total_steps)
    found: dict[float, dict[str, float]] = {step: {} for step in steps}
    for row in board.of_stage("search"):
        for step, fid in sorted(row.fids.items()):
            below = [rung for rung in steps if rung <= step]
            if (
                below
                and step < total_steps
                and fid is not None
                and row.method != "dense"
                and row.trial_id not in found[below[-1]]
            ):
                found[below[-1]][row.trial_id] = fid
    return found


def trial_page(view: View, row: Row) -> Facts:
    """All of `raysparse show`."""
    trial = view.results / "trials" / row.trial_id
    table = _table(view.results, row.trial_id)
    checkpoints = folders.checkpoints(view.results / "checkpoints" / row.trial_id)
    samples = sorted((trial / "samples").glob("*.png"), key=lambda path: path.stem.zfill(12))
    reports = records.reports_of(table) if table is not None else []
    return trial_facts(row) | {
        "results": str(view.results),
        "config": row.config,
        "protocol": json.loads(_column(table, "protocol")) if table is not None else None,
        "intermediate_protocol": json.loads(_column(table, "intermediate_protocol") or "null") if table else None,
        "reports": [_report(report) for report in reports]
        or [{"step": s, "intermediate_fid" if row.intermediate else "fid": fid} for s, fid in row.fids.items()],
        "rungs": _places(view, row),
        "events": _events(view.results, row.trial_id),
        "log": trial_log.tail(trial),
        "log_file": str(trial_log.path_of(trial)) if trial_log.path_of(trial).is_file() else None,
        "checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "samples": str(samples[-1]) if samples else None,
        "command": _again(view, row),
        "sweep_command": _column(table, "command") if table is not None else None,
        "what_to_do": _what_to_do(view, row),
    }


def difference(view: View, a: Row, b: Row) -> Facts:
    """All of `raysparse diff`: settings that differ, and FIDs where their protocols agree, by step."""
    left, right = _flat(a.config), _flat(b.config)
    names = [name for name in dict.fromkeys([*left, *right]) if left.get(name) != right.get(name)]
    protocols = []
    for row in (a, b):
        table = _table(view.results, row.trial_id)
        protocols.append(json.loads(_column(table, "protocol")) if table is not None else {})
    unlike = [name for name in dict.fromkeys([*protocols[0], *protocols[1]]) if _of(protocols, name, 0, 1)]
    comparable = all(protocols) and not unlike
    early = [row.config.get("evaluate", {}).get("intermediate") for row in (a, b)]
    steps = sorted({*a.fids, *b.fids}) if comparable and early[0] == early[1] else []
    own = [("fid", None, [a.fid, b.fid])] if comparable and (a.intermediate or b.intermediate) else []
    by_step = [("intermediate_fid" if a.intermediate else "fid", s, [a.fids.get(s), b.fids.get(s)]) for s in steps]
    return {
        "trials": [trial_facts(row) for row in (a, b)],
        "settings": {name: [left.get(name), right.get(name)] for name in names},
        "comparable": comparable,
        "protocols_differ_in": {name: [found.get(name) for found in protocols] for name in unlike}
        if all(protocols)
        else None,
        "fids": [{"step": step, "of": of, "fids": fids} for of, step, fids in [*by_step, *own]],
    }


def _of(found: Sequence[Mapping[str, Any]], name: str, one: int, other: int) -> bool:
    return bool(found[one].get(name) != found[other].get(name))


def _places(view: View, row: Row) -> list[Facts]:
    """The trial's FID at each rung it reached, its place there now, and how many were there."""
    if view.sweep is None or view.sweep.asha is None or row.stage != "search":
        return []
    found = []
    for step, at in rungs(view.board, view.sweep.asha, row.total_steps).items():
        if row.trial_id in at:
            place = sum(fid < at[row.trial_id] for fid in at.values()) + 1
            found.append({"rung": step, "fid": at[row.trial_id], "place": place, "of": len(at)})
    return found


def _events(results: Path, trial_id: str) -> list[Facts]:
    """What happened to a trial apart from its reports."""
    kinds = ("started", "note", "stopped", "failed", "completed", "reopened", "second_chance", "chosen")
    return [
        {"time": _iso(item.time), "kind": item.kind, "step": item.step, "reason": item.reason}
        for item in read(results / "journal.jsonl")
        if item.trial_id == trial_id and item.kind in kinds
    ]


def _again(view: View, row: Row) -> str:
    """The command that trains this trial alone, to the same numbers."""
    path = view.results / "trials" / row.trial_id / "trial.json"
    if view.sweep is None or not path.is_file():
        table = _table(view.results, row.trial_id)
        go_on = f"raysparse resume {shlex.quote(str(view.results))}"
        return str(_column(table, "command")) if table is not None else go_on
    words = ["raysparse", "train", str(path), "--output", f"results/{row.trial_id}"]
    workers = view.sweep.resources.workers
    return shlex.join(words + (["--workers", str(workers)] if workers > 1 else []))


def _what_to_do(view: View, row: Row) -> str | None:
    if row.diverged:
        return "nothing by itself: the same settings diverge again; a lower optimizer.lr may not"
    if row.state == "FAILED" or (row.state == "STOPPED" and row.stopped_by):
        results = shlex.quote(str(view.results))
        return f"raysparse retry {results} {row.trial_id} && raysparse resume {results}"
    return view.what_to_do if row.open else None


def _report(report: records.Report) -> Facts:
    left_out = ("samples_png", "layer_density", "mask_sample")
    return {name: value for name, value in dataclasses.asdict(report).items() if name not in left_out}


def _board_of_records(results: Path) -> Board:
    board = Board()
    board.folder = results
    for path in records.record_paths(results):
        rows = records.read_trial(path).drop_columns(["samples_png", "layer_density", "mask_sample"]).to_pylist()
        first = rows[0]
        config = json.loads(first["config"])
        board.rows[first["trial_id"]] = Row(
            trial_id=first["trial_id"],
            stage=first["stage"],
            method=first["method"],
            point={"method": first["method"]},
            seed=first["seed"],
            total_steps=first["total_steps"],
            config=config,
            state=first["state"],
            reason=first["state_reason"],
        )
        row = board.rows[first["trial_id"]]
        name = "intermediate_fid" if row.intermediate else "fid"
        row.fids = {report["step"]: report[name] for report in rows if report["step"] is not None}
        row.result = rows[-1]["fid"] if row.state == "COMPLETED" else None
    return board


def _table(results: Path, trial_id: str) -> pa.Table | None:
    path = results / "records" / f"{trial_id}.parquet"
    return records.read_trial(path) if path.is_file() else None


def _column(table: pa.Table, name: str) -> Any:
    return table[name][0].as_py()


def _measured_by(row: Row) -> str:
    """The settings that a FID's protocol is made of, and more: equal text, comparable FIDs."""
    sections = [row.config.get(name) or {} for name in ("data", "evaluate", "first_stage")]
    # A setting that is None may be one that the version which planned the trial did not have.
    known = [{name: value for name, value in section.items() if value is not None} for section in sections]
    return json.dumps(known, sort_keys=True)


def _mean(rows: Sequence[Row]) -> float:
    return sum(_fid(row) for row in rows) / len(rows)


def _fid(row: Row) -> float:
    return row.fid if row.fid is not None else float("inf")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} -> {"train.steps": 5}."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")

"""Gauges of a sweep for Prometheus, through Ray's metrics: Ray's dashboard has no page for trials.

Ray puts `ray_` before each name. Its agent serves them on the driver's node whether or not the dashboard is on; where
to find it stands in RESULTS/metrics/targets.json, in Prometheus' form for file-based discovery: Ray writes such a file
only with its dashboard, and into a folder that another user or machine does not know.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from raysparse.asha import Asha
from raysparse.files import write_text
from raysparse.space import Sweep
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.dashboards import OF_SWEEP, OF_TRIAL, TRIAL_TAGS

PUBLISH_S = 5.0  # of what belongs to the whole sweep
TARGETS_S = 30.0  # nodes come and go

STATES = ("PENDING", "RUNNING", "COMPLETED", "STOPPED", "FAILED")


class Gauges(Callback):  # type: ignore[misc]
    """Publishes what the ledger and the reports say; reads nothing, decides nothing."""

    def __init__(self, ledger: Ledger, sweep: Sweep, results: Path) -> None:
        self._ledger, self._sweep, self._results = ledger, sweep, results
        self._publish_at = self._targets_at = 0.0  # when each is due
        self._targets: list[str] | None = None

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._ledger.board.rows[trial.config["trial_id"]]
        density = result.get("density")
        values = {
            "raysparse_trial_fid": row.fid,
            "raysparse_trial_intermediate_fid": row.latest,
            "raysparse_trial_loss": result.get("train_loss"),
            "raysparse_trial_step": row.step,
            "raysparse_trial_sparsity": None if density is None else 1 - density,
        }
        tags = dict(zip(TRIAL_TAGS, (self._sweep.name, row.trial_id, row.method, row.stage), strict=True))
        for name, value in values.items():
            if value is not None:
                gauge(name, OF_TRIAL[name], TRIAL_TAGS).set(float(value), tags)
        self._publish()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._publish()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._publish()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now = time.monotonic()
        if now >= self._publish_at:
            self._publish()
        if now >= self._targets_at:
            self._targets_at = now + TARGETS_S
            self._write_targets(targets())

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self._publish()
        self._write_targets([])

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing reads

    def _publish(self) -> None:
        self._publish_at = time.monotonic() + PUBLISH_S
        resources = self._sweep.resources
        gpus = resources.workers * resources.gpus_per_worker
        for name, tags, value in of_sweep(self._ledger.board, self._sweep.asha, gpus, time.time()):
            meaning, keys = OF_SWEEP[name]
            gauge(name, meaning, ("sweep", *keys)).set(value, {"sweep": self._sweep.name, **tags})

    def _write_targets(self, found: list[str]) -> None:
        if found == self._targets:
            return
        self._targets = found
        content = [{"labels": {"job": "ray"}, "targets": found}] if found else []
        with contextlib.suppress(OSError):  # a full disk shows elsewhere
            write_text(self._results / "metrics" / "targets.json", json.dumps(content) + "\n")


def of_sweep(board: Board, asha: Asha | None, gpus: float, now: float) -> list[tuple[str, dict[str, str], float]]:
    """(gauge, tags, value) of all that belongs to the whole sweep. gpus: that one trial holds."""
    rows, counts = list(board.rows.values()), board.counts()
    hours = board.busy_s(now) / 3600
    found: list[tuple[str, dict[str, str], float]] = [
        ("raysparse_active_trials", {}, float(sum(row.since is not None for row in rows))),
        ("raysparse_trial_hours", {}, hours),
        ("raysparse_gpu_hours", {}, hours * gpus),
    ]
    found += [("raysparse_trials", {"state": state.lower()}, float(counts.get(state, 0))) for state in STATES]
    if asha:
        rungs = [rung_of(row, asha) for row in rows if row.state == "STOPPED" and not row.stopped_by]
        for rung in sorted(set(rungs)):
            found.append(("raysparse_stopped_at_rung", {"rung": f"{rung:g}"}, float(rungs.count(rung))))
    for method in dict.fromkeys(row.method for row in rows):
        fids = [row.fid for row in rows if row.method == method and row.state == "COMPLETED" and row.fid is not None]
        if fids:
            found.append(("raysparse_best_fid", {"method": method}, min(fids)))
    return found


def rung_of(row: Row, asha: Asha) -> float:
    """The step of the highest rung at or below the row's last report."""
    return max((rung for rung in asha.rung_steps(row.total_steps) if rung <= row.step), default=0.0)


@functools.cache
def gauge(name: str, meaning: str, tags: tuple[str, ...]) -> Any:
    """One Ray gauge of this process; a second of the same name would replace it."""
    from ray.util.metrics import Gauge

    return Gauge(name, meaning, tag_keys=tags)


def targets() -> list[str]:
    """host:port of the metrics of each node that is alive."""
    import ray

    return sorted(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"])

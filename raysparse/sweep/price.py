"""What a sweep costs: the plan's trials and seconds, times what simulations say is left after early stopping."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysparse import results as records
from raysparse import space
from raysparse.config import TrialConfig, parse
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import objectives
from raysparse.sweep.board import Row
from raysparse.sweep.curves import Curves, Published, Recorded
from raysparse.sweep.simulate import MOST_WORKERS, Pace, Simulated, in_world, simulate
from raysparse.sweep.trainable import KEEP_CHECKPOINTS

if TYPE_CHECKING:
    from raysparse.train import plan

# fp32 arrays of a checkpoint beside the masks (one bit a weight): weights, EMA, and what the optimizer keeps.
ARRAYS = {"adamw": 4, "sgd": 3}
COSTED = 50  # trials; 8 to 190 ms each


def price(
    sweep: Sweep,
    *,
    results: Sequence[Path] = (),
    step_s: float | None = None,
    price_per_hour: float | None = None,
    workers: int | None = None,
    worlds: int = 10,
    curves: str | None = None,
    cpus: int | None = None,
) -> dict[str, Any]:
    """The price as plain data; each forecast is {mean, low, high} over `worlds` simulations, ends included.

    results: folders of sweeps that were run, for seconds and curves; curves: a published data set instead.
    step_s: seconds of a training step. workers: trials at a time. UsageError where a folder has nothing to learn from.
    """
    from raysparse.train import plan

    base = space.parsed_base(sweep)
    recorded = recorded_seconds(results) if results else None
    known: Curves = Recorded(results) if results else _published(base, curves)
    planned = plan.plan(sweep, cpus=cpus, seconds=derived(base, step_s) if step_s else recorded)
    timed = (
        "the step is given, the evaluation derived from it"
        if step_s
        else "recorded"
        if recorded
        else "measured on this machine"
    )
    at_a_time = min(workers or planned["concurrent"], MOST_WORKERS)
    pace = Pace(
        step_s=planned["step_s"],
        evaluation_s=planned["evaluation_s"],
        last_evaluation_s=planned["last_evaluation_s"],
    )
    runs = [
        simulate(in_world(sweep, world), known, workers=at_a_time, world=world, pace=pace) for world in range(worlds)
    ]
    full = simulate(sweep.model_copy(update={"asha": None}), known, workers=at_a_time, pace=pace)
    flops = TrainingFlops(planned)
    units = sweep.resources.workers * (sweep.resources.gpus_per_worker or sweep.resources.cpus_per_worker)
    return {
        "plan": planned,
        "timed": timed,
        "curves": known.source,
        "workers": at_a_time,
        "worlds": worlds,
        "unit": "GPU" if sweep.resources.gpus_per_worker else "CPU",
        "price_per_hour": price_per_hour,
        "checkpoint_bytes": checkpoint_bytes(base, planned["trials"][0]["params_total"]),
        "full": _figures(full, base, planned, flops, units, price_per_hour),
        "expected": _spreads([_figures(run, base, planned, flops, units, price_per_hour) for run in runs]),
        "saved_share": _spread([1 - run.spent_share for run in runs]),
        "stopped_at": _stopped(runs),
    }


class TrainingFlops:
    """Of a step of each simulated trial, true convention: of those planned, and of the first COSTED others by their own
    settings. A later one is taken to cost what the one of its method does that is nearest to it in S."""

    def __init__(self, planned: dict[str, Any]) -> None:
        steps = planned["steps_per_trial"]
        self._planned: dict[str, float] = {
            row["trial_id"]: row["flops_train_true"] / steps for row in planned["trials"]
        }
        self._others: dict[str, tuple[str, float, float]] = {}  # settings -> method, S, FLOPs

    def of_step(self, row: Row) -> float:
        if row.trial_id in self._planned:
            return self._planned[row.trial_id]
        settings, sparsity = json.dumps(row.config | {"seed": None}), row.setting("sparsity") or 0.0
        near = [one for one in self._others.values() if one[0] == row.method]
        if settings not in self._others and (len(self._others) < COSTED or not near):
            whole = objectives.costs(parse(row.config, row.trial_id))["flops_train"]
            self._others[settings] = row.method, sparsity, whole / row.total_steps
        if settings in self._others:
            return self._others[settings][2]
        return min(near, key=lambda one: abs(one[1] - sparsity))[2]


def derived(config: TrialConfig, step_s: float) -> plan.Seconds:
    """Where only the seconds of a step are known: a forward pass is a third of a step's work."""
    from raysparse.train import plan
    from raysparse.train.costs import evaluations

    forward_s = step_s / config.train.batch_size / 3
    return plan.Seconds(
        step_s, *plan.of_evaluations(config, lambda of: of.evaluate.generated * evaluations(of) * forward_s)
    )


def recorded_seconds(folders: Sequence[Path]) -> plan.Seconds:
    """Medians over the recorded trials. UsageError without any."""
    from raysparse.train import plan

    steps, evaluations, lasts = [], [], []
    for folder in folders:
        for path in records.record_paths(folder):
            names = ["step", "train_s", "evaluate_s", "total_steps", "intermediate_fid"]
            rows = records.read_trial(path).select(names).to_pylist()
            rows = [row for row in rows if row["step"]]
            if rows and (last := rows[-1])["train_s"]:
                steps.append(last["train_s"] / last["step"])
                spent = [row["evaluate_s"] for row in rows]
                if last["step"] >= last["total_steps"] and last["intermediate_fid"] is not None:
                    lasts.append(spent[-1] - sum(spent[-2:-1]))
                    rows, spent = rows[:-1], spent[:-1]
                evaluations += [spent[-1] / len(rows)] if rows else []
    if not steps:
        raise UsageError(f"{', '.join(map(str, folders))} hold no trial with a report; give --step-seconds instead")
    evaluation_s = statistics.median(evaluations or lasts)
    return plan.Seconds(statistics.median(steps), evaluation_s, statistics.median(lasts or evaluations))


def checkpoint_bytes(config: TrialConfig, params_total: int) -> int:
    """Of one checkpoint: weights, EMA and the optimizer's state in fp32, masks as bits."""
    return round(params_total * (4 * ARRAYS[config.optimizer.name] + 1 / 8))


def _published(base: TrialConfig, name: str | None) -> Published:
    nearest = Published.nearest(base.model_dump(mode="json"))
    return Published(name, nearest.descent) if name else nearest


def _figures(
    run: Simulated,
    base: TrialConfig,
    planned: dict[str, Any],
    flops: TrainingFlops,
    units: float,
    price_per_hour: float | None,
) -> dict[str, float | None]:
    """What one simulated sweep takes, both stages together where no stage is named."""
    rows = list(run.board.rows.values())
    reports = {row.trial_id: -(-row.step // base.evaluate.every_steps) for row in rows}
    seconds = (run.search_steps + run.confirm_steps) * planned["step_s"]
    seconds += sum(reports.values()) * planned["evaluation_s"]
    ended = sum(row.step >= row.total_steps for row in rows)
    seconds += ended * (planned["last_evaluation_s"] - planned["evaluation_s"])
    kept = sum(min(KEEP_CHECKPOINTS, count) for count in reports.values())
    return {
        "completed": run.states().get("COMPLETED", 0),
        "search_steps": run.search_steps,
        "confirm_trials": len(run.board.of_stage("confirm")),
        "confirm_steps": run.confirm_steps,
        "flops_train_true": sum(row.step * flops.of_step(row) for row in rows),
        "unit_hours": seconds * units / 3600,
        "hours": run.hours,
        "money": None if price_per_hour is None else seconds / 3600 * price_per_hour,
        "checkpoints_bytes": kept * checkpoint_bytes(base, planned["trials"][0]["params_total"]),
        "best_fid": run.best_fid,
        "driver_cpu_s": run.driver_cpu_s,
    }


def _spreads(figures: Sequence[dict[str, float | None]]) -> dict[str, dict[str, float] | None]:
    found = {name: [value for one in figures if (value := one[name]) is not None] for name in figures[0]}
    return {name: _spread(values) for name, values in found.items()}


def _stopped(runs: Sequence[Simulated]) -> dict[int, float]:
    """step -> mean number of trials stopped there."""
    steps = sorted({step for run in runs for step in run.stopped_at})
    return {step: statistics.mean(run.stopped_at.get(step, 0) for run in runs) for step in steps}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """None of nothing."""
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)} if values else None

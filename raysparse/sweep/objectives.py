"""What a search may make small: the FID, which is measured, and costs, which follow from a trial's settings.

Costs are in the true convention of the FLOPs (every multiply-add counts, dense layers and dense gradients included).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysparse.config import TrialConfig
from raysparse.space import Sweep
from raysparse.sweep.board import Row

# Objective -> column of the records.
COLUMNS = {
    "flops_inference": "flops_inference_true",  # one sample, all DDIM steps
    "flops_train": "flops_train_true",  # the full budget
    "params_active": "params_active",
}


def of(sweep: Sweep) -> tuple[str, ...]:
    """The objectives by which a sweep's trials are ranked; FID and inference FLOPs where it names none or one."""
    named = sweep.search.objectives if sweep.search else ()
    return named if len(named) > 1 else ("fid", "flops_inference")


def costs(trial: TrialConfig) -> dict[str, float]:
    """Every cost of a trial, from its settings alone. Imports torch."""
    free: Any = {
        "seed": True,
        "optimizer": True,
        "sparse": {"prune_ratio", "prune_schedule"},
    }  # settings without a cost
    return _costs(trial.model_dump_json(exclude=free))


@functools.lru_cache(maxsize=10_000)
def _costs(content: str) -> dict[str, float]:
    """20 to 650 ms, the most for the U-Net of 274 million weights."""
    from raysparse.metrics import flops
    from raysparse.train import setup

    trial = TrialConfig.model_validate_json(content)
    found = setup.estimate(trial)
    return {
        "flops_inference": found.inference(flops.TRUE),
        "flops_train": found.train(flops.TRUE, trial.train.steps),
        "params_active": float(found.params_active),
    }


def recorded_costs(results: Path, trial_id: str) -> dict[str, float]:
    """Every cost of a trial, from its records; {} where there are none that can be read."""
    try:
        table = pq.read_table(results / "records" / f"{trial_id}.parquet", columns=list(COLUMNS.values()))
        return {name: float(table[column][0].as_py()) for name, column in COLUMNS.items()}
    except (OSError, pa.ArrowException, IndexError, TypeError):
        return {}


def values(row: Row, objectives: Sequence[str], known: Mapping[str, float] | None = None) -> tuple[float, ...] | None:
    """A row's values, its FID among them; None where one is not known. known: its costs, else the row's own."""
    have = {**(row.costs if known is None else known), "fid": row.fid}
    found = [have.get(name) for name in objectives]
    return None if None in found else tuple(float(value) for value in found if value is not None)


def front_of(rows: Iterable[Row]) -> list[Row]:
    """The completed rows on the Pareto front of a search with several objectives, by FID; [] of any other search."""
    done = {row.trial_id: row for row in rows if row.stage == "search" and row.state == "COMPLETED" and row.costs}
    points = {name: point for name, row in done.items() if (point := values(row, ("fid", *row.costs))) is not None}
    return [done[name] for name in front(points)]


def words(row: Row) -> str:
    """`FID 21.3, flops_inference 1.28e+09`."""
    return ", ".join([f"FID {row.fid:.4g}", *(f"{name} {cost:.4g}" for name, cost in row.costs.items())])


def front(points: Mapping[str, Sequence[float]]) -> list[str]:
    """The names of the points that none of the others beats: the Pareto front, in the order of the first value."""
    ahead = [name for name, one in points.items() if not any(beats(other, one) for other in points.values())]
    return sorted(ahead, key=lambda name: (*points[name], name))


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is nowhere larger than the other and somewhere smaller."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

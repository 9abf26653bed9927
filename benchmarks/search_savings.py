"""What a search spends to find what a full grid would: (random, TPE) x (no stopping, ASHA), over simulated sweeps.

    python benchmarks/search_savings.py                    # two spaces, 20 seeds: 100 minutes on one core
    python benchmarks/search_savings.py --space kanjivg --seeds 5
    python benchmarks/search_savings.py --driver 10000     # the driver's CPU seconds, 1,000 trials at a time

The grid is trained to its end in each of 20 worlds: a world draws each configuration's noise over seeds and its
learning curve from the published results (raysparse/sweep/curves.py). A search has found when it has completed a
configuration whose FID is within 1 % of the lowest FID in that world's grid; `share` is the optimizer steps spent until
then, half-done trials included, over the grid's: the median, and the 10th and 90th percentile. A search that ends
without finding counts as its own steps plus the whole grid. `mean FID` asks the same of a configuration's mean over
seeds, without the luck of one: within 1 % of the grid's best mean. Samplers draw from the grid's lists; `tpe ranges`
from ranges over the same axes, logarithmic but for S. ASHA a/b: first rung at the a-th evaluation, one in b goes on;
+ x: as many second chances as x of the points, until it has found. explore: `explore_first`, one evaluation of each
point, then the best go on; the other rungs after 4, 6 and 8 of 20 evaluations, one in two goes on.
Spaces: the paper's grid of S and p (56 points); `+dT` has five ΔTe as well (256 points).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from raysparse import space
from raysparse.space import Sweep
from raysparse.sweep.board import Row
from raysparse.sweep.curves import LONG, SHORT, Descent, Published
from raysparse.sweep.simulate import grid_fids, simulate

SPACES = Path(__file__).resolve().parents[1] / "tune_spaces"
WITHIN = 1.01
INTERVALS = (0.25, 0.5, 1, 2, 4)  # of the papers' ΔTe
Stopping = tuple[tuple[int, ...], float, float, bool] | None
# Chosen of 12 sets of rungs with factors of 1.5 to 5, in 80 worlds that are not those of the 20 seeds, by a quick model
# of the rule. On both spaces what counted was a rung at a fifth of the steps, where curves have ceased to cross.
EXPLORE = (1, 4, 6, 8)
STOPPING: dict[str, Stopping] = {  # (evaluations before the rungs, reduction factor, chances per point, explore first)
    "none": None,
    "ASHA 1/3": ((1,), 3, 0, False),
    "ASHA 1/2": ((1,), 2, 0, False),
    "ASHA 2/3": ((2,), 3, 0, False),
    "ASHA 1/3 +all": ((1,), 3, 1, False),
    "explore 1,3,9 +all": ((1, 3, 9), 3, 1, True),
    "explore +50%": (EXPLORE, 2, 0.5, True),  # of tune_spaces/kanjivg.yaml
    "explore +all": (EXPLORE, 2, 1, True),
}
DESCENTS = {"long": LONG, "short": SHORT}


def grid_of(name: str) -> Sweep:
    """The grid of a shipped sweep file, `+dT` with an axis of ΔTe; without the confirm stage."""
    stem, _, wide = name.partition("+")
    sweep = space.load(SPACES / f"{stem}.yaml")
    content = sweep.model_dump(mode="json") | {"confirm": None, "asha": None}
    if wide:
        usual = sweep.base["sparse"]["update_interval"]
        for method in ("magran", "rigl"):
            content["grid"][method]["update_interval"] = [round(usual * factor) for factor in INTERVALS]
    return space.parse(content, name)


def search_of(grid: Sweep, sampler: str, stopping: Stopping, seed: int) -> Sweep:
    """A search over the grid's own points, as many trials as it has."""
    points = len(space.grid_points(grid))
    every = space.parsed_base(grid).evaluate.every_steps
    content = grid.model_dump(mode="json")
    axes = content.pop("grid")
    if sampler == "tpe ranges":
        axes = {method: {name: _range(name, values) for name, values in of.items()} for method, of in axes.items()}
    content["search"] = {"trials": points, "sampler": sampler.split()[0], "seed": seed, "axes": axes}
    if stopping:
        rungs, factor, chances, explore = stopping
        steps = {"rungs": [every * n for n in rungs]} if explore else {"grace_steps": every * rungs[0]}
        chosen = {"reduction_factor": factor, "explore_first": explore, "second_chances": round(chances * points)}
        content["asha"] = steps | chosen
    return space.parse(content, grid.name)


def _range(name: str, values: list[float]) -> dict[str, Any]:
    return {"low": min(values), "high": max(values), "log": name != "sparsity"}


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of the grid's steps, per seed; NaN where it was not found."""

    measured: list[float]
    mean: list[float]
    spent: list[float]  # by the whole search

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, values in (("measured", self.measured), ("mean", self.mean)):
            counted = [1 + spent if np.isnan(v) else v for v, spent in zip(values, self.spent, strict=True)]
            low, middle, high = np.quantile(counted, (0.1, 0.5, 0.9))
            row |= {
                f"{name}_share": float(middle),
                f"{name}_low": float(low),
                f"{name}_high": float(high),
                f"{name}_average": float(np.mean(counted)),
                f"{name}_found": int(np.isfinite(values).sum()),
            }
        return row | {"spent": float(np.mean(self.spent)), "seeds": len(self.spent)}


def shares(grid: Sweep, descent: Descent, sampler: str, stopping: Stopping, seeds: int, workers: int) -> Shares:
    base = space.parsed_base(grid)
    curves = Published.nearest(base.model_dump(mode="json"), descent)
    points = [space.trial(grid, point) for point in space.grid_points(grid)]
    full = len(points) * base.train.steps
    best_mean = min(curves.final(trial.model_dump(mode="json"))[0] for trial in points)
    found = Shares([], [], [])
    for seed in range(seeds):
        target = WITHIN * min(grid_fids(grid, curves, seed).values())
        search = search_of(grid, sampler, stopping, seed)
        run = simulate(
            search,
            curves,
            workers=workers,
            world=seed,
            targets=(partial(_at_most, target), partial(_mean_at_most, WITHIN * best_mean, curves)),
        )
        for values, steps in zip((found.measured, found.mean), run.found_steps, strict=True):
            values.append(float("nan") if steps is None else steps / full)
        found.spent.append(run.search_steps / full)
    return found


def _at_most(fid: float, row: Row) -> bool:
    return row.fid is not None and row.fid <= fid


def _mean_at_most(fid: float, curves: Published, row: Row) -> bool:
    return curves.final(row.config)[0] <= fid


def driver(trials: int, workers: int) -> list[dict[str, Any]]:
    """CPU seconds of the driver, journal on disk included, over ranges of S, p and ΔTe."""
    axes = {
        "sparsity": {"low": 0.1, "high": 0.9},
        "prune_ratio": {"low": 0.05, "high": 0.5, "log": True},
        "update_interval": {"low": 200, "high": 3200, "step": 100},
    }
    content = space.load(SPACES / "kanjivg.yaml").model_dump(mode="json") | {"grid": None, "confirm": None}
    content["asha"] = {"grace_steps": 4080, "reduction_factor": 3}
    rows = []
    for sampler in ("random", "tpe"):
        content["search"] = {"trials": trials, "sampler": sampler, "axes": {"dense": {}, "rigl": axes, "magran": axes}}
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run = simulate(space.parse(content, "driver"), Published("kanjivg"), workers=workers, journal=Path(folder))
            rows.append(
                {
                    "sampler": sampler,
                    "trials": trials,
                    "workers": workers,
                    "calls": run.decisions,
                    "driver_cpu_s": run.driver_cpu_s,
                    "wall_s": time.perf_counter() - start,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", action="append", help="a shipped sweep file's name, with +dT for an axis of ΔTe")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--sampler", action="append", choices=("random", "tpe", "tpe ranges"))
    parser.add_argument("--stopping", action="append", choices=sorted(STOPPING))
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--descent", choices=sorted(DESCENTS), default="long", help="learning curves: see the docs")
    parser.add_argument("--driver", type=int, metavar="TRIALS", help="the driver's own CPU seconds instead")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.driver:
        rows = driver(options.driver, min(1000, options.driver))
        if options.json:
            print(json.dumps(rows))
            return
        print("| sampler | trials | at a time | calls | driver CPU s | wall s |\n|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['sampler']} | {row['trials']:,} | {row['workers']:,} | {row['calls']:,} "
                f"| {row['driver_cpu_s']:.1f} | {row['wall_s']:.1f} |"
            )
        return
    rows = []
    if not options.json:
        print("| space | points | sampler | stopping | share, measured FID | found | share, mean FID | found |")
        print("|---|---|---|---|---|---|---|---|")
    for name in options.space or ["kanjivg", "kanjivg+dT"]:
        grid = grid_of(name)
        for sampler in options.sampler or ("random", "tpe", "tpe ranges"):
            for label in options.stopping or STOPPING:
                stopping = STOPPING[label]
                result = shares(grid, DESCENTS[options.descent], sampler, stopping, options.seeds, options.workers)
                row = {"space": name, "points": len(space.grid_points(grid)), "sampler": sampler, "stopping": label}
                rows.append(row | result.row())
                if not options.json:
                    print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows))


def line(row: dict[str, Any]) -> str:
    cells = [row["space"], row["points"], row["sampler"], row["stopping"]]
    for name in ("measured", "mean"):
        cells.append(f"{row[f'{name}_share']:.1%} ({row[f'{name}_low']:.1%} to {row[f'{name}_high']:.1%})")
        cells.append(f"{row[f'{name}_found']} of {row['seeds']}")
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()

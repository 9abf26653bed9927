"""A finished grid, confirmed over three seeds, whose every mean is known: for parts that need more than a search.

Mean FIDs: dense 12; sparse 8 + 16 S + OFFSET of the method and p. Seeds 1, 2, 3 lie at -1, 0, +1 of the mean.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from synthetic_records import PROTOCOL, Folder, facts, report

from raysparse.results import Outcome, write_table, write_trial

SPARSITIES = (0.25, 0.5, 0.9)
OFFSET = {("static", None): 2.0, ("magran", 0.5): 4.0, ("magran", 0.05): 1.0, ("rigl", 0.5): 3.0, ("rigl", 0.05): -2.0}
# Bits of a mask sample: 12 of one layer, and a layer that is dense.
MASKS = {1: "f0", 2: "3c", 3: "0f"}


def mean(method: str, sparsity: float, p: float | None) -> float:
    """The mean FID of a configuration."""
    return 12.0 if method == "dense" else 8 + 16 * sparsity + OFFSET[method, p]


def fill_grid(folder: Folder, dataset: str = "hershey", model: str = "chirodiff", protocol: str = PROTOCOL) -> Folder:
    """The grid: 3 dense trials, 45 sparse ones, reports at steps 200 and 400."""
    for seed in (1, 2, 3):
        for method, sparsity, p in [("dense", 0.0, None), *((m, s, p) for m, p in OFFSET for s in SPARSITIES)]:
            trial = facts(method, sparsity, seed, prune_ratio=p, dataset=dataset, model=model, protocol=protocol)
            if dataset != "hershey" or protocol != PROTOCOL or model != "chirodiff":
                trial = dataclasses.replace(trial, trial_id=f"{trial.trial_id}-{model}-{dataset}-{abs(hash(protocol))}")
            fid = mean(method, sparsity, p) + seed - 2
            layers = {"gru.weight": 1 - sparsity, "out.weight": 1.0} if method != "dense" else {}
            masks = None if method == "dense" else json.dumps({"gru.weight": MASKS[seed], "out.weight": "ff"})
            first = None if method == "dense" else json.dumps({"gru.weight": "c3", "out.weight": "ff"})
            moving = p is not None
            rows = [
                report(step, value, density=1 - sparsity, layer_density=json.dumps(layers), mask_sample=bits,
                       topology_updates=step // 100 if moving else 0, topology_changed=(p or 0.0) / 2,
                       flops_spent_true=1e9 * step * (1 - sparsity), train_s=step * 0.1 * (1 + sparsity))
                for step, value, bits in ((200, fid + 10, first), (400, fid, masks))
            ]  # fmt: skip
            write_trial(folder.path, trial, Outcome("COMPLETED"), rows)
    return folder


def evaluated(folder: Folder, steps: int, factor: float, sparsity: float = 0.25, **protocol: object) -> None:
    """What `raysparse evaluate --ddim-steps` leaves of dense and rigl (p = .05): each FID times `factor`."""
    text = json.dumps(json.loads(PROTOCOL) | {"ddim_steps": steps} | protocol)
    for seed in (1, 2, 3):
        for method, s, p in (("dense", 0.0, None), ("rigl", sparsity, 0.05)):
            own = facts(method, s, seed, prune_ratio=p)
            again = dataclasses.replace(own, protocol=text, stage="single", config=own.config.replace("}", "}", 1))
            row = report(400, (mean(method, s, p) + seed - 2) * factor, density=1 - s)
            name = f"{own.trial_id}-{steps}-{len(protocol)}"
            write_table(Path(folder.path) / "evaluations" / f"{name}.parquet", again, Outcome("COMPLETED"), [row])


def fill_two_budgets(folder: Folder) -> Folder:
    """Three seeds each, evaluated at 100 DDIM steps too, where all are 1 lower: at 400 training steps dense 12 and
    static 22, at 4,000 dense 62 and rigl 7."""
    text = json.dumps(json.loads(PROTOCOL) | {"ddim_steps": 100})
    for seed in (1, 2, 3):
        for method, s, steps, fid in (
            ("dense", 0.0, 400, 12.0), ("static", 0.5, 400, 22.0), ("dense", 0.0, 4000, 62.0), ("rigl", 0.5, 4000, 7.0),
        ):  # fmt: skip
            trial = facts(method, s, seed, total_steps=steps, trial_id=f"{method}-{steps}-{seed}")
            folder.add(trial, [(steps, fid + seed - 2)])
            again = dataclasses.replace(trial, protocol=text, stage="single")
            path = Path(folder.path) / "evaluations" / f"{trial.trial_id}-100.parquet"
            write_table(path, again, Outcome("COMPLETED"), [report(steps, fid + seed - 3)])
    return folder

"""What a sweep will take, before it starts: trials, parameters, FLOPs, and hours from a short measured step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from raysparse import plugins, rng, space
from raysparse.config import TrialConfig
from raysparse.metrics import flops
from raysparse.space import Sweep
from raysparse.train import checks, setup
from raysparse.train.costs import Costs

_TIMED = 3  # steps and forward passes timed, after one that is not; the median counts


def cost_row(config: TrialConfig, mean_points: float | None = None) -> dict[str, Any]:
    """Parameters and FLOPs of one trial, by the names of `results.Facts`."""
    return _row(setup.estimate(config, mean_points))


def plan(sweep: Sweep, *, cpus: int | None = None) -> dict[str, Any]:
    """The plan of a sweep as plain data for `--dry-run`.

    Hours are of this machine: a dense step and a forward pass at the sweep's batch sizes on random sketches, measured
    now, times what the sweep asks for. `hours_full` lets every trial run to its end; `hours_asha` lets ASHA keep one in
    reduction_factor at each rung, which is what it aims at. Both take a sparse step to be as long as a dense one.
    """
    base = space.parsed_base(sweep)
    setup.check(base)
    points = list(sweep.search.seed_points) if sweep.search else space.grid_points(sweep)
    trials = [space.trial(sweep, point) for point in points]
    rows = [_row(setup.estimate(trial)) | _settings(trial) for trial in trials]
    count = space.trial_count(sweep)
    confirmed = len(sweep.confirm.seeds) * sweep.confirm.best_per_method * len(sweep.axes) if sweep.confirm else 0
    mean_points = setup.estimate(base).mean_points
    step_s, evaluation_s = measure(base, mean_points)
    concurrent = _concurrent(sweep, cpus or os.cpu_count() or 1)
    evaluations = -(-base.train.steps // base.evaluate.every_steps)
    trial_s = base.train.steps * step_s + evaluations * evaluation_s
    return {
        "name": sweep.name,
        "trials": rows,
        "search_trials": count,
        "confirm_trials": confirmed,
        "steps_per_trial": base.train.steps,
        "mean_points": mean_points,
        "step_s": step_s,
        "evaluation_s": evaluation_s,
        "concurrent": concurrent,
        "hours_full": (count + confirmed) * trial_s / concurrent / 3600,
        "hours_asha": (count * _expected_share(sweep, base.train.steps) + confirmed) * trial_s / concurrent / 3600,
    }


def measure(config: TrialConfig, mean_points: float) -> tuple[float, float]:
    """Seconds of a training step and of an evaluation on this machine, a GPU where there is one."""
    torch.set_num_threads(config.train.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, options = plugins.load("models", config.model.name), checks.model_options(config)
    model = module.build(options, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters())

    def inputs(batch: int) -> dict[str, Any]:
        given = module.example(options, batch, max(1, round(mean_points)), device=device)
        noise = torch.randn(given["x"].shape, generator=rng.generator(0, "plan"))
        return {**given, "x": noise.to(device)}

    training, sampling = inputs(config.train.batch_size), inputs(config.evaluate.batch_size)

    def step() -> None:
        model(**training).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.inference_mode():
            model(**sampling)

    batches = -(-config.evaluate.generated // config.evaluate.batch_size)
    return _median_s(step, device), _median_s(forward, device) * batches * config.evaluate.ddim_steps


def _row(cost: Costs) -> dict[str, Any]:
    steps = cost.config.train.steps
    return {
        "sparsity": cost.config.sparse.sparsity or 0.0,
        "params_total": cost.params_total,
        "params_active": cost.params_active,
        "flops_inference_paper": cost.inference(cost.paper),
        "flops_inference_true": cost.inference(flops.TRUE),
        "flops_inference_dense_true": cost.inference(flops.TRUE, dense=True),
        "flops_train_paper": cost.train(cost.paper, steps),
        "flops_train_true": cost.train(flops.TRUE, steps),
        "flops_train_dense_true": cost.train(flops.TRUE, steps, dense=True),
    }


def _settings(trial: TrialConfig) -> dict[str, Any]:
    sparse = trial.sparse
    names = ("method", "sparsity", "prune_ratio", "update_interval")
    return {"trial_id": trial.trial_id} | {name: getattr(sparse, name) for name in names}


def _concurrent(sweep: Sweep, cpus: int) -> int:
    wanted = sweep.resources
    fit = int(cpus // (wanted.workers * wanted.cpus_per_worker))
    if wanted.gpus_per_worker:
        fit = min(fit, int(torch.cuda.device_count() / (wanted.workers * wanted.gpus_per_worker)))
    return max(1, min(fit, wanted.max_concurrent or fit))


def _expected_share(sweep: Sweep, steps: int) -> float:
    """Share of all steps that ASHA leaves if it keeps one in reduction_factor at each rung."""
    if sweep.asha is None:
        return 1.0
    rung, alive, spent, share = float(sweep.asha.grace_steps), 1.0, 0.0, 0.0
    while rung < steps:
        share += alive * (rung - spent)
        spent, alive, rung = rung, alive / sweep.asha.reduction_factor, rung * sweep.asha.reduction_factor
    return (share + alive * (steps - spent)) / steps


def _median_s(work: Callable[[], None], device: str) -> float:
    seconds = []
    for _ in range(1 + _TIMED):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[_TIMED // 2]

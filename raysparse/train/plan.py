"""What a sweep will take, before it starts: trials, parameters, FLOPs, and hours from a short measured step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from raysparse import plugins, rng, space
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.metrics import flops
from raysparse.space import Sweep
from raysparse.train import checks, runtime, sampling, setup
from raysparse.train.costs import Costs, evaluations
from raysparse.train.evaluate import passes

_TIMED = 3  # steps and forward passes timed, after one that is not; the median counts
# What takes longer than this at full batch size is timed with fewer examples and scaled up: a step of the 274M U-Net
# takes minutes on a CPU.
_LONG_S = 4.0


class Seconds(NamedTuple):
    """Of a training step, of an evaluation before a trial's last step, and of the one there."""

    step: float
    evaluation: float
    last_evaluation: float


def cost_row(config: TrialConfig, mean_points: float | None = None) -> dict[str, Any]:
    """Parameters and FLOPs of one trial, by the names of `results.Facts`."""
    return _row(setup.estimate(config, mean_points))


def plan(sweep: Sweep, *, cpus: int | None = None, seconds: Seconds | None = None) -> dict[str, Any]:
    """The plan of a sweep as plain data for `--dry-run`.

    Hours are of this machine: a worker's share of a dense step and of the samples, forward passes and the decoding of a
    latent, measured now on random input, times what the sweep asks for; the extractor's time is left out. `hours_full`
    lets every trial run to its end; `hours_asha` lets ASHA keep one in reduction_factor at each rung, which is what it
    aims at. Both take a sparse step to be as long as a dense one. seconds: where they are known; not measured then.
    """
    base = space.parsed_base(sweep)
    checks.check_settings(base)
    check_planned(sweep)
    points = list(sweep.search.seed_points) or [{"method": "dense"}] if sweep.search else space.grid_points(sweep)
    trials = [space.trial(sweep, point) for point in points]
    rows = [_row(setup.estimate(trial)) | _settings(trial) for trial in trials]
    count = space.trial_count(sweep)
    confirmed = _confirmed(sweep)
    mean_points = setup.estimate(base).mean_points
    step_s, evaluation_s, last_s = seconds or measure(base, mean_points, sweep.resources.workers)
    concurrent = _concurrent(sweep, cpus or os.cpu_count() or 1)
    before = -(-base.train.steps // base.evaluate.every_steps) - 1
    trial_s = base.train.steps * step_s + before * evaluation_s + last_s
    return {
        "name": sweep.name,
        "trials": rows,
        "search_trials": count,
        "confirm_trials": confirmed,
        "steps_per_trial": base.train.steps,
        "mean_points": mean_points if len(checks.value_shape(base)) == 2 else None,
        "step_s": step_s,
        "evaluation_s": evaluation_s,
        "last_evaluation_s": last_s,
        "caution": None if seconds else _caution(sweep),
        "concurrent": concurrent,
        "hours_full": (count + confirmed) * trial_s / concurrent / 3600,
        "hours_asha": (count * _expected_share(sweep, base.train.steps) + confirmed) * trial_s / concurrent / 3600,
    }


def check_planned(sweep: Sweep, *, choices: bool = True) -> list[TrialConfig]:
    """The trials of space.tried_points. UsageError naming the first point whose trial its settings would end."""
    trials = []
    for point in space.tried_points(sweep, choices=choices):
        try:
            trials.append(space.trial(sweep, point))
            checks.check_settings(trials[-1])
        except UsageError as error:
            raise UsageError(f"{sweep.name}, {point}: {error}") from None
    return trials


def _confirmed(sweep: Sweep) -> int:
    """Trials of the confirm stage, at most: dense is always there, and no method has more winners than points."""
    if sweep.confirm is None:
        return 0
    if sweep.search and len(sweep.search.objectives) > 1:
        return len(sweep.confirm.seeds) * (sweep.confirm.front + 1)  # and dense
    axes_of = {"dense": {}, **sweep.axes}
    best = {method: sweep.confirm.best_per_method if axes else 1 for method, axes in axes_of.items()}
    if sweep.grid:
        methods = [point["method"] for point in space.grid_points(sweep)]
        best = {method: min(most, methods.count(method)) for method, most in best.items()}
    return len(sweep.confirm.seeds) * sum(best.values())


def measure(config: TrialConfig, mean_points: float, workers: int = 1) -> Seconds:
    """On this machine, a GPU where there is one: of one of the trial's workers, with its share of each batch."""
    torch.set_num_threads(config.train.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, options = plugins.load("models", config.model.name), checks.model_options(config)
    model = module.build(options, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    points = max(1, round(mean_points))

    def inputs(batch: int) -> dict[str, Any]:
        given = module.example(options, batch, points, device=device)
        noise = torch.randn(given["x"].shape, generator=rng.generator(0, "plan"))
        return {**given, "x": noise.to(device)}

    def step(batch: dict[str, Any]) -> None:
        with runtime.autocast(config.train.precision, torch.device(device)):
            loss = model(**batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def forward(batch: dict[str, Any]) -> None:
        with runtime.autocast(config.sampling_precision, torch.device(device)):
            model(**batch)

    size, at_a_time = config.evaluate.batch_size, 1
    train_s = _seconds(step, inputs, max(1, config.train.batch_size // workers), device)
    if device == "cuda":
        at_a_time = sampling.batches_for_a_gpu(config, module.example(options, 1, points, device="meta")["x"].shape)
    forward_s = _seconds(forward, inputs, size * at_a_time, device) / (size * at_a_time)
    decoding_s = _decoding_s(config, device)

    def sampling_s(of: TrialConfig) -> float:
        """Of the worker with most batches."""
        batches = math.ceil(of.evaluate.generated / size)
        most = sum(map(len, passes(batches, at_a_time, 0, workers)))
        return min(most * size, of.evaluate.generated) * (forward_s * evaluations(of) + decoding_s)

    return Seconds(train_s, *of_evaluations(config, sampling_s))


def of_evaluations(config: TrialConfig, seconds: Callable[[TrialConfig], float]) -> tuple[float, float]:
    """Of an evaluation before a trial's last step and of the one there. seconds: of the samples of one protocol."""
    own, cheaper = seconds(config), config.intermediate
    if cheaper is None:
        return own, own
    return seconds(cheaper), own + seconds(cheaper)


def _decoding_s(config: TrialConfig, device: str) -> float:
    """Of one sample by the first stage, with random weights; 0 without one."""
    if config.first_stage is None:
        return 0.0
    module = plugins.load("models", config.first_stage.name)
    model = module.build(module.Config(**config.first_stage.options), seed=0).to(device)
    latent = torch.zeros(1, *checks.value_shape(config), device=device)

    @torch.inference_mode()
    def decode(latents: torch.Tensor) -> None:
        model.decode(latents)

    return _seconds(decode, lambda count: latent.expand(count, -1, -1, -1), 1, device)


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
        "layers_dense": dict(cost.stays_dense),
        "layers_by_element": list(cost.by_element),
    }


def _settings(trial: TrialConfig) -> dict[str, Any]:
    sparse = trial.sparse
    names = ("method", "sparsity", "prune_ratio", "update_interval")
    others = dict(sorted((sparse.model_extra or {}).items()))
    if sparse.prune_schedule not in (None, "constant"):
        others["prune_schedule"] = sparse.prune_schedule
    return {"trial_id": trial.trial_id, "others": others} | {name: getattr(sparse, name) for name in names}


def _concurrent(sweep: Sweep, cpus: int) -> int:
    wanted = sweep.resources
    fit = wanted.workers_on(cpus, torch.cuda.device_count()) // wanted.workers
    return max(1, min(fit, wanted.max_concurrent or fit))


def _caution(sweep: Sweep) -> str | None:
    """What seconds that were measured here leave out."""
    resources, train = sweep.resources, space.parsed_base(sweep).train
    together, said = resources.workers_per_gpu, []
    if resources.gpus_per_worker and not torch.cuda.is_available():
        said.append("the sweep asks for GPUs and this machine has none: seconds and trials at a time are of its CPUs")
    elif together > 1:
        said.append(
            f"the seconds are those of one trial alone on the GPU: what {together} that share it lose to each other is "
            "not measured here (benchmarks/packing.py does that)"
        )
    if resources.workers > 1:
        said.append(
            f"the seconds are those of one of {resources.workers} workers: what they wait for each other is not counted"
        )
    faster = [f"train.{name}" for name in ("compile", "cuda_graph", "channels_last") if getattr(train, name)]
    if faster:
        said.append(f"the step is measured without {', '.join(faster)}: the sweep's may be much shorter")
    return "; ".join(said) or None


def _expected_share(sweep: Sweep, steps: int) -> float:
    """Share of all steps that ASHA leaves if it keeps one in reduction_factor at each rung."""
    if sweep.asha is None:
        return 1.0
    alive, spent, share = 1.0, 0.0, 0.0
    for rung in sweep.asha.rung_steps(steps):
        share += alive * (rung - spent)
        spent, alive = rung, alive / sweep.asha.reduction_factor
    return (share + alive * (steps - spent)) / steps


def _seconds(work: Callable[[Any], None], inputs: Callable[[int], Any], batch: int, device: str) -> float:
    """Of `work` on `batch` examples; of as many as are quick, scaled up, where all would take a CPU too long."""
    if device == "cuda":
        given, count = _begun_on_gpu(work, inputs, batch)
    else:
        one = _timed(work, inputs(1), device)  # the first call also allocates: too high, and so at most too careful
        count = batch if one * batch <= _LONG_S else max(1, min(batch, int(_LONG_S / one)))
        given = inputs(count)
        if one * count > _LONG_S:
            return _timed(work, given, device) / count * batch
        work(given)
    return sorted(_timed(work, given, device) for _ in range(_TIMED))[_TIMED // 2] / count * batch


def _begun_on_gpu(work: Callable[[Any], None], inputs: Callable[[int], Any], batch: int) -> tuple[Any, int]:
    """Inputs on which `work` was done once, and of how many examples: all, or as many as there is memory for.

    One example says nothing there: its call compiles kernels, and it takes about as long as a hundred.
    """
    count = batch
    while True:
        try:
            given = inputs(count)
            _timed(work, given, "cuda")
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            count //= 2
        else:
            return given, count


def _timed(work: Callable[[Any], None], given: Any, device: str) -> float:
    start = time.perf_counter()
    work(given)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

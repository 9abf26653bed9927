"""Trials of several workers: a small driver in Tune, and in it Ray Train with one DDP process per worker.

The driver takes memory but no CPU: at Tune's default of one CPU drivers would hold all CPUs and no worker start,
and with 0.01 CPU two workers no longer fit on two cores.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from raysparse.errors import RanksApart
from raysparse.sweep import pulse
from raysparse.sweep.leaving import STARTS_LIMIT, NodeGoes
from raysparse.sweep.scheduler import exit_detail
from raysparse.sweep.trainable import failure, train_rank
from raysparse.train.folders import checkpoints

DRIVER = {"memory": 256 * 2**20}  # bytes; Tune refuses a bundle of nothing
OTHERS_LOST = "a rank was lost: the others found its connection closed"
# What a rank's collective says when another rank is gone. A trial's own error that has one of these words is tried a
# few times more before it is told.
BROKEN = ("closed by peer", "reset by peer", "broken pipe", "refused", "nccl", "gloo", "timed out", "timeout", "socket")


def train(config: dict[str, Any]) -> None:
    """Tune's function trainable for trials of several workers."""
    from ray import tune
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = Path(config["results"]) / "trials" / config["trial_id"]
    gpus, lost, furthest = config["gpus_per_worker"], 0, _saved(config)
    while True:
        attempt = time.time_ns()
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=config | {"attempt": attempt},
            scaling_config=ScalingConfig(
                num_workers=config["workers"],
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": config["cpus_per_worker"], **({"GPU": gpus} if gpus else {})},
            ),
            run_config=RunConfig(
                name=f"train-{config['trial_id']}-{attempt}",
                storage_path=str(Path(config["results"]) / "train"),
                callbacks=[TuneReportCallback()],
                failure_config=FailureConfig(max_failures=0),  # here: only a lost worker is worth another start
            ),
        )
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            raised = _raised(error)
            if raised is not None:
                tune.report(failure(folder, raised))
                return
            # Lost workers start again, without end as long as the trial gets further in between.
            lost, furthest = (1, _saved(config)) if _saved(config) > furthest else (lost + 1, furthest)
            if lost > STARTS_LIMIT:
                raise
            reason = pulse.hung(folder) or _lost_because(error)
            tune.report({"step": 0, "fid": None, "note": f"{reason}; started again"})


def _lost_because(error: BaseException) -> str:
    """Which ranks were lost, and how, as Ray says it."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    causes = _causes(error)
    for cause in causes.values():
        if isinstance(cause, NodeGoes | RanksApart):
            return str(cause)
    lost = RayActorError | OutOfMemoryError
    gone = {rank: exit_detail(str(cause)) for rank, cause in causes.items() if isinstance(cause, lost)}
    return "; ".join(f"rank {rank} was lost: {how}" for rank, how in gone.items()) or OTHERS_LOST


def _saved(config: dict[str, Any]) -> str:
    """The name of the trial's last checkpoint, which grows with its step."""
    folder = Path(config["results"]) / "checkpoints" / config["trial_id"]
    return max((path.name for path in checkpoints(folder)), default="")


def train_loop(config: dict[str, Any]) -> None:
    """One rank. The process group is Ray Train's."""
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device
    from ray.train.v2._internal.execution import context as reporting

    # It would say all metrics of each report, a sample of the masks too: 4 KB and more in a line of the trial's log,
    # which is cut at trial_log.LIMIT_BYTES and has a summary of its own.
    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)
    context = ray_train.get_context()
    device = get_device() if config["gpus_per_worker"] else torch.device("cpu")
    train_rank(
        config,
        ray_train.report,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=str(device),
    )


def _raised(error: BaseException) -> BaseException | None:
    """The exception that a worker's own code raised; None where another start may do: a worker or its node was lost.

    The ranks beside a lost one raise as well, in their collective: `BROKEN` is what gloo and NCCL say then.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import RayTrainError  # its public names are subclasses

    causes = list(_causes(error).values())
    for cause in causes:
        if isinstance(cause, RayActorError | OutOfMemoryError | RayTrainError | NodeGoes | RanksApart):
            return None
        if any(words in str(cause).lower() for words in BROKEN):
            return None
    return causes[0] if causes else None


def _causes(error: BaseException) -> dict[int, BaseException]:
    """Rank -> what ended it."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    return {rank: getattr(one, "cause", None) or one.__cause__ or one for rank, one in failures.items()}

"""Process groups, and the few collectives that training and evaluation need. With one process all are no-ops."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def init(rank: int, world_size: int, init_method: str, device: str, timeout_s: float = 1800) -> None:
    """Join the group of a trial: nccl on CUDA, gloo elsewhere. init_method as torch's, e.g. `file:///tmp/x/store`."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def init_from_env(device: str) -> tuple[int, int]:
    """Join the group that `torchrun` describes in the environment. -> (rank, world size), (0, 1) without one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    init(rank, world_size, "env://", device)
    return rank, world_size


def cleanup() -> None:
    """Leave the group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_process() -> NoReturn:
    """End a spawned rank whose work is done and said, with exit code 0 and without Python's shutdown.

    There gloo's threads may still be owned by a DDP model that was not collected, and the process aborts ("terminate
    called without an active exception", seen in one of four runs of the test suite on busy cores): the parent would
    take a rank that has done its work for one that died.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def all_sum(tensor: Tensor, world_size: int) -> Tensor:
    """`tensor` summed over the ranks, in place."""
    if world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def average_gradients(parameters: Iterable[Tensor], world_size: int) -> None:
    """The gradients of parameters, averaged over the ranks in place, by one collective."""
    if world_size == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = all_sum(torch.cat([grad.flatten() for grad in grads]), world_size).div_(world_size)
    for grad, mean in zip(grads, torch.split(means, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view(grad.shape))


def from_rank_0(value: T | None, world_size: int) -> T:
    """Rank 0's value on every rank; what the others pass is ignored."""
    if world_size > 1:
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    assert value is not None
    return value


def from_all(value: T, world_size: int) -> list[T]:
    """Every rank's value by rank, on every rank."""
    values: list[Any] = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values

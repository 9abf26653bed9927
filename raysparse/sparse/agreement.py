"""Masks on all ranks are identical, or every rank raises: hashes are compared at each topology update."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from raysparse.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FAILED = -1  # in place of the step: this rank could not compute its masks


class Agreement:
    """Compares masks over a process group; does nothing without one.

    All ranks see all hashes, so all raise the same error and none is left waiting in a collective.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group

    @classmethod
    def of(cls, model: nn.Module, group: ProcessGroup | None) -> Self:
        """The given group's, else a DDP model's."""
        if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        return cls(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a process group cannot be copied, and a copied engine talks to the same ranks

    def check(self, step: int, masks: Mapping[str, Tensor]) -> None:
        """UsageError on every rank, naming the first layer, where masks, layers or step differ from rank 0's."""
        if self._group is None:
            return
        headers = self._exchange([step, len(masks), _digest(" ".join(masks).encode())])
        _check_headers(headers)
        hashes = self._exchange([_digest(_packed(mask)) for mask in masks.values()])
        for index, name in enumerate(masks):
            others = [rank for rank, row in enumerate(hashes) if row[index] != hashes[0][index]]
            if others:
                raise UsageError(
                    f"the mask of layer {name!r} differs at step {step} on rank(s) {_listed(others)} from rank 0: the "
                    f"seed, weights or gradients differed before. Use one seed, and reduce gradients before masking."
                )

    def give_up(self, step: int, layers: int) -> None:
        """Tell the other ranks that this one raises an error of its own, in the place of `check`."""
        if self._group is not None:
            self._exchange([FAILED, layers, step])

    def _exchange(self, numbers: list[int]) -> list[list[int]]:
        """One row of int64 per rank."""
        import torch.distributed as dist

        assert self._group is not None
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(rows, mine, group=self._group)
        return [row.tolist() for row in rows]


def _check_headers(headers: list[list[int]]) -> None:
    failed = [rank for rank, header in enumerate(headers) if header[0] == FAILED]
    if failed:
        raise UsageError(f"rank(s) {_listed(failed)} failed in the topology update; no mask was changed.")
    steps = [header[0] for header in headers]
    if len(set(steps)) > 1:
        raise UsageError(f"the ranks are at different optimizer steps, {_listed(steps)}: one skipped a step.")
    layers = [rank for rank, header in enumerate(headers) if header[1:] != headers[0][1:]]
    if layers:
        raise UsageError(f"rank(s) {_listed(layers)} mask other layers than rank 0: the models differ.")


def _packed(mask: Tensor) -> bytes:
    return np.packbits(mask.detach().cpu().numpy()).tobytes()


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

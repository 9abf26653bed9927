"""A network whose forward and backward are recorded once as CUDA graphs and replayed at each training step."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from raysparse.errors import UsageError


class Graphed:
    """network(x, timesteps, **cond), recorded at the first call: all later ones have its shapes and dtypes.

    In training mode, with gradients for the network's parameters, whose tensors stay the same; what it returns is
    overwritten by the next call. Conditions on the host are copied to the device. Equal to the network bit for bit.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._replay: Any = None

    def __call__(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        values = [value.to(x.device, non_blocking=True) for value in cond.values()]
        if self._replay is None:
            self._replay = self._recorded([x, timesteps, *values], list(cond))
        return cast(Tensor, self._replay(x, timesteps, *values))

    def _recorded(self, given: list[Tensor], names: list[str]) -> Any:
        kind = given[0].device.type
        halves = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        try:
            with halves, warnings.catch_warnings():
                # No gradient is accumulated while it is recorded: it is returned, and added at each replay.
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
                places = tuple(tensor.clone() for tensor in given)
                return torch.cuda.make_graphed_callables(_Positional(self._network, names), places)
        except RuntimeError as error:
            raise UsageError(
                f"train.cuda_graph is true, but this model's step cannot be recorded here; leave it out: {error}"
            ) from error


class _Positional(nn.Module):
    """A network called without keywords, as PyTorch records it."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x: Tensor, timesteps: Tensor, *values: Tensor) -> Tensor:
        return cast(Tensor, self.network(x, timesteps, **dict(zip(self.names, values, strict=True))))

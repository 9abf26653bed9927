"""What a batch from the host becomes: on the device, but for what is needed on the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# A model packs sketches by their lengths, which cuts time into steps on the host. Fetched back from a GPU they would
# make the host wait, at every prediction, for all that the GPU has still to do.
ON_HOST = ("lengths",)


def placed(cond: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The conditions of a batch from the host: all but the lengths on the device, without waiting for it."""
    return {name: value if name in ON_HOST else on_device(value, device) for name, value in cond.items()}


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """What is on the host, on the device, without waiting for it."""
    if device.type == "cuda":  # what is not pinned CUDA copies in its turn, and the host waits: from 64 KB on
        value = value.pin_memory()
    return value.to(device, non_blocking=True)

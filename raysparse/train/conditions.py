"""Where what a model is told beside x and the timesteps is needed: on the device, or on the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# A model packs sketches by their lengths, which cuts time into steps on the host. Fetched back from a GPU they would
# make the host wait, at every prediction, for all that the GPU has still to do.
ON_HOST = ("lengths",)


def placed(cond: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The conditions of a batch from the host: all but the lengths on the device, without waiting for it."""
    return {name: value if name in ON_HOST else value.to(device, non_blocking=True) for name, value in cond.items()}

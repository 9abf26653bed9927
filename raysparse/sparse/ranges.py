"""Masks per range of timesteps over one set of weights: which there are, and the network that goes by them."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raysparse.sparse.layout import Layout, layout

Masks = dict[str, Tensor]


def layouts(
    model: nn.Module, weights: Mapping[str, Tensor], settings: Any, groups: Sequence[Sequence[str]] | None = None
) -> tuple[list[Layout], Layout]:
    """Of every range, and of all together: of each layer what the densest range has. UsageError as `layout`."""
    each = [layout(model, weights, own, groups) for own in settings.each()]
    densest = layout(model, weights, settings, groups)
    most = {name: max(found.counts[name] for found in each) for name in densest.counts}
    return each, dataclasses.replace(densest, counts=most)


def nested(each: Sequence[Layout], choose: Callable[[str, Layout], Tensor]) -> list[Masks]:
    """The masks of every range. choose: a layer's mask under a layout, from scores that are the same for all."""
    return [{name: choose(name, found) for name in found.counts} for found in each]


class ByTimestep(nn.Module):
    """A denoiser that uses each range's own mask: forward(x, timesteps, **cond) as the model's, examples in any order.

    One pass of the model for each range that the batch has timesteps of, over those examples; in sampling, where all
    have one timestep, that is one pass. The gradient of a weight is the sum over the ranges whose masks have it.
    """

    def __init__(self, model: nn.Module, masks: Sequence[Masks], bounds: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.masks = list(masks)  # no buffers: they are the engine's
        self.bounds = list(bounds)

    @property
    def null_label(self) -> int | None:
        """The model's own."""
        found: int | None = getattr(self.model, "null_label", None)
        return found

    def forward(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        rows: dict[int, list[int]] = {}
        for row, t in enumerate(timesteps.tolist()):  # the one wait for a GPU
            rows.setdefault(bisect.bisect_right(self.bounds[:-1], t), []).append(row)
        if len(rows) == 1:
            (index,) = rows
            return self._range(index, x, timesteps, cond)
        parts = []
        for index in sorted(rows):
            own = torch.tensor(rows[index])
            there = own.to(x.device, non_blocking=True)
            given = {name: c[own if c.device.type == "cpu" else there] for name, c in cond.items()}
            parts.append(self._range(index, x[there], timesteps[there], given))
        order = torch.tensor([row for index in sorted(rows) for row in rows[index]]).argsort()
        if x.ndim == 3:  # sketches: a part may be cut at its own longest one
            parts = [nn.functional.pad(part, (0, 0, 0, x.shape[1] - part.shape[1])) for part in parts]
        return torch.cat(parts)[order.to(x.device, non_blocking=True)]

    def _range(self, index: int, x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        parameters = dict(self.model.named_parameters())
        masked = {name: parameters[name] * mask for name, mask in self.masks[index].items()}
        found: Tensor = functional_call(self.model, masked, (x, timesteps), dict(cond))
        return found

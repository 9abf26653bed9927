"""ChiroDiff for k trials at a time: their weights lie in one tensor per parameter, a step is batched over the trials.

Each trial has its own sketches of unequal lengths, weights, frequencies, mask, method, optimizer and running mean;
computed together are the prediction and the gradients. Equal to separate training to rounding
(tests/models/test_models_packing.py). On a CPU the points are packed and the recurrence is PyTorch's operations; on a
GPU they are padded, the recurrence is raysparse's kernel for all trials at once, and a CUDA graph can hold the step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysparse.models import _cuda_gru
from raysparse.train.conditions import on_device

GRU = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Of one trial and step, on the CPU: x, eps float32 [B, L, 3], timesteps, lengths int64 [B]."""

    x: Tensor
    eps: Tensor
    timesteps: Tensor
    lengths: Tensor


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The batches of k trials as one, on the device.

    The j-th longest sketch of each trial lies in slot j, which lasts as long as the longest of them: so the trials'
    points lie alike, time-major, P to each trial, and few are padding. Rows count over all trials' points.
    """

    x: Tensor  # float32 [k, B, L, 3]
    eps: Tensor
    timesteps: Tensor  # int64 [k, B]
    rows: Tensor  # int64 [k, P]: where a point lies in x, its first three dimensions flattened
    sketch: Tensor  # int64 [k, P]: where its sketch lies in timesteps, flattened
    reverse: Tensor  # int64 [k, P]: the row with the sketch's point from its other end
    share: Tensor  # float32 [k, P]: of the trial's loss; 0 for padding
    sizes: list[int]  # slots that still run at each time step

    def tensors(self) -> list[Tensor]:
        return [value for field in dataclasses.fields(self) if isinstance(value := getattr(self, field.name), Tensor)]


@dataclasses.dataclass(frozen=True)
class Padded:
    """The batches of k trials as one, whose shapes do not depend on lengths."""

    x: Tensor  # float32 [k, B, L, 3]
    eps: Tensor
    timesteps: Tensor  # int64 [k, B]
    lengths: Tensor  # int32 [k, B]

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def padded(batches: Sequence[Batch], device: str) -> Padded:
    x, eps, timesteps, lengths = (
        torch.stack([getattr(one, field.name) for one in batches]) for field in dataclasses.fields(Batch)
    )
    return Padded(*(on_device(tensor, torch.device(device)) for tensor in (x, eps, timesteps, lengths.int())))


def stacked(batches: Sequence[Batch], device: str) -> Stacked:
    x, lengths = torch.stack([one.x for one in batches]), torch.stack([one.lengths for one in batches])
    k, size, longest, _ = x.shape
    ordered, order = lengths.sort(dim=1, descending=True, stable=True)
    lasts = ordered.amax(0)
    running = torch.arange(int(lasts[0]))[:, None] < lasts
    point, slot = running.nonzero(as_tuple=True)  # [P]: the time and slot of a row
    sizes = running.sum(1)
    starts = sizes.cumsum(0) - sizes
    length, trial = ordered[:, slot], torch.arange(k)[:, None]
    inside = point < length
    other = torch.where(inside, starts[(length - 1 - point).clamp(min=0)] + slot, torch.arange(len(slot)))
    sketch = trial * size + order[:, slot]
    found = Stacked(
        x,
        torch.stack([one.eps for one in batches]),
        torch.stack([one.timesteps for one in batches]),
        sketch * longest + point,
        sketch,
        trial * len(slot) + other,
        inside / (length * size),
        sizes.tolist(),
    )
    return dataclasses.replace(
        found, **{f.name: getattr(found, f.name).to(device) for f in dataclasses.fields(found)[:-1]}
    )


class Stack:
    """Trials whose weights are slices of one tensor per parameter; each keeps its engine, optimizer and running mean.

    trials: of packing.py, all of one model size, on one device; their weights and gradients become slices.
    """

    def __init__(self, trials: Sequence[Any]) -> None:
        self.trials = trials
        self.device, self.config = trials[0].device, trials[0].model.config
        self.weights: dict[str, Tensor] = {}
        for name, _ in trials[0].model.named_parameters():
            own = [trial.model.get_parameter(name) for trial in trials]
            whole = torch.stack([weight.detach() for weight in own]).requires_grad_()
            whole.grad = torch.zeros_like(whole)
            for number, weight in enumerate(own):
                weight.data, weight.grad = whole.detach()[number], whole.grad[number]
            self.weights[name] = whole
        self.frequencies = torch.stack([trial.model.frequencies for trial in trials])

    def step(self, batches: Sequence[Batch]) -> None:
        self.run(padded(batches, self.device) if self.device == "cuda" else stacked(batches, self.device))
        for trial in self.trials:
            trial.close()

    def run(self, batch: Stacked | Padded) -> None:
        """One step of all trials but for what `Trial.close` does."""
        for weight in self.weights.values():
            weight.grad.zero_()  # type: ignore[union-attr]
        noisy = self.trials[0].schedule.add_noise(
            batch.x.flatten(0, 1), batch.eps.flatten(0, 1), batch.timesteps.flatten()
        )
        loss = self.padded_loss if isinstance(batch, Padded) else self.packed_loss
        loss(noisy, batch).backward()  # type: ignore[arg-type, no-untyped-call]
        for trial in self.trials:
            trial.apply()

    def packed_loss(self, noisy: Tensor, batch: Stacked) -> Tensor:
        """noisy: float32 [k B, L, 3] -> the sum of the trials' losses."""
        error = self.predict(noisy, batch) - rows_of(batch.eps.flatten(0, 2), batch.rows)
        return (error.square().mean(2) * batch.share).sum()

    def padded_loss(self, noisy: Tensor, batch: Padded) -> Tensor:
        noisy = noisy.view_as(batch.x)
        inside = torch.arange(noisy.shape[2], device=noisy.device) < batch.lengths[..., None]
        noisy = noisy.where(inside[..., None], 0)
        velocity = nn.functional.pad(noisy[:, :, 1:, :2] - noisy[:, :, :-1, :2], (0, 0, 1, 0))
        features = self.time_features(batch.timesteps)[:, :, None].expand(*noisy.shape[:3], -1)
        hidden = torch.cat((noisy, velocity, features), 3)
        for layer in range(self.config.layers):
            names = (f"{name}_l{layer}{end}" for end in ("", "_reverse") for name in GRU)
            hidden = _cuda_gru.layer(hidden, [self.weights[f"gru.{name}"] for name in names], batch.lengths)
        mixed = self.linear("mix", hidden.flatten(1, 2))
        prediction = self.linear("out", torch.cat((mixed, features.flatten(1, 2)), 2)).view_as(noisy)
        error = (prediction.float() - batch.eps).where(inside[..., None], 0)
        return (error.square().mean(3).sum(2) / batch.lengths).mean(1).sum()

    def predict(self, noisy: Tensor, batch: Stacked) -> Tensor:
        """ChiroDiff's forward. noisy: float32 [k B, L, 3] -> eps float32 [k, P, 3]."""
        velocity = nn.functional.pad(noisy[:, 1:, :2] - noisy[:, :-1, :2], (0, 0, 1, 0))
        points = rows_of(torch.cat((noisy, velocity), 2).flatten(0, 1), batch.rows)
        features = rows_of(self.time_features(batch.timesteps).flatten(0, 1), batch.sketch)
        hidden = torch.cat((points, features), 2)
        for layer in range(self.config.layers):
            hidden = self.recur(hidden, layer, batch)
        mixed = self.linear("mix", hidden)
        return self.linear("out", torch.cat((mixed, features), 2))

    def time_features(self, timesteps: Tensor) -> Tensor:
        """int64 [k, B] -> float32 [k, B, 8]."""
        turns = (timesteps / self.config.timesteps)[..., None] * (8 * math.pi * self.frequencies[:, None])
        return torch.cat((turns.sin(), turns.cos()), 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.baddbmm(self.weights[f"{name}.bias"][:, None], x, self.weights[f"{name}.weight"].mT)

    def recur(self, x: Tensor, layer: int, batch: Stacked) -> Tensor:
        """A bidirectional GRU layer: float32 [k, P, in] -> [k, P, 2 h]. The 2 k directions advance together."""
        w_ih, w_hh, b_ih, b_hh = (
            torch.stack([self.weights[f"gru.{name}_l{layer}{end}"] for end in ("", "_reverse")], 1).flatten(0, 1)
            for name in GRU
        )
        sides = torch.stack((x, rows_of(x.flatten(0, 1), batch.reverse)), 1).flatten(0, 1)
        given = torch.baddbmm(b_ih[:, None], sides, w_ih.mT)
        last = given.new_zeros(len(given), batch.sizes[0], self.config.hidden)
        states = []
        for gates, size in zip(given.split(batch.sizes, 1), batch.sizes, strict=True):
            last = last[:, :size]
            r_z_n, own = gates.chunk(3, 2), torch.baddbmm(b_hh[:, None], last, w_hh.mT).chunk(3, 2)
            r, z = ((a + b).sigmoid() for a, b in zip(r_z_n[:2], own[:2], strict=True))
            last = torch.lerp((r_z_n[2] + r * own[2]).tanh(), last, z)
            states.append(last)
        onward, back = torch.cat(states, 1).unflatten(0, (-1, 2)).unbind(1)
        return torch.cat((onward, rows_of(back.flatten(0, 1), batch.reverse)), 2)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x [rows, c], index [k, P] -> [k, P, c]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)

"""A small model and its training loop, for the tests beside it."""

from __future__ import annotations

import torch
from torch import nn


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 8, generator=generator), torch.randn(size, 4, generator=generator)


def backward(model, optimizer, step):
    x, y = batch(step)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()


def train(model, optimizer, engine, steps, check=None):
    for step in range(steps):
        backward(model, optimizer, step)
        engine.mask_gradients()
        if check:
            check("masked")
        optimizer.step()
        engine.after_step()
        if check:
            check("stepped")


def state_of(optimizer, weight):
    state = {k: v for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor)}
    return [v for k, v in state.items() if v.shape == weight.shape and k != "step_size"]  # Rprop's learning rates

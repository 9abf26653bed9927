"""The learning rate as a function of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math

from raysparse.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (0 is the first): linear warm-up, then constant, or a half cosine that ends near 0."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.lr_schedule == "constant":
        return optimizer.lr
    done = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * done))

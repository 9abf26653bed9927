"""What training minimises."""

from __future__ import annotations

import torch
from torch import Tensor


def eps_mse(prediction: Tensor, eps: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean over the examples of `eps_mse_per_example`: a scalar, float32."""
    return eps_mse_per_example(prediction, eps, lengths).mean()


def eps_mse_per_example(prediction: Tensor, eps: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean squared error of predicted noise, float32 [B].

    Images [B, C, H, W], lengths None: mean over all values. Sketches [B, L, C], lengths int64 [B], on any device: mean
    over the first `length` points and their channels, so a long sketch counts as much as a short one (PAPER:
    ChiroDiff); what lies beyond, NaN included, has no influence.
    """
    if prediction.shape != eps.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and eps {tuple(eps.shape)} differ in shape")
    error = prediction.float() - eps.float()
    if lengths is None:
        return error.square().flatten(1).mean(1)
    lengths = lengths.to(error.device, non_blocking=True)
    inside = torch.arange(error.shape[1], device=error.device) < lengths[:, None]
    error = error.where(inside[:, :, None], 0)  # before the square, whose gradient would carry a NaN back
    return error.square().mean(2).sum(1) / lengths

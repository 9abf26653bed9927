"""How many parameters a model has and how many are active."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def count(model: nn.Module) -> int:
    """params_total: the numbers in all parameters, a shared one counted once, buffers (frozen frequencies) left out."""
    return sum(parameter.numel() for parameter in model.parameters())


def active(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> int:
    """params_active: mask 1, and all of what has no mask. masks: parameter name -> bool tensor of its shape."""
    parameters = dict(model.named_parameters())
    strangers = sorted(masks.keys() - parameters.keys())
    if strangers:
        raise ValueError(f"masks for parameters that the model lacks: {', '.join(strangers[:5])}")
    return sum(int(masks[name].sum()) if name in masks else tensor.numel() for name, tensor in parameters.items())


def active_at(model: nn.Module, densities: Mapping[str, float]) -> int:
    """params_active before any mask exists: density x size rounded, per tensor. densities: parameter name -> (0, 1]."""
    parameters = dict(model.named_parameters())
    strangers = sorted(densities.keys() - parameters.keys())
    if strangers:
        raise ValueError(f"densities for parameters that the model lacks: {', '.join(strangers[:5])}")
    return sum(round(tensor.numel() * densities.get(name, 1.0)) for name, tensor in parameters.items())

"""What runs a trained model when it samples: PyTorch, or kernels that skip the weights that are 0.

A model's file that has such kernels has `sparse_runtime(model) -> nn.Module`: the same function of the same arguments,
to rounding, of the weights as they are now. It raises UsageError where this machine or the model can't.
"""

from __future__ import annotations

import torch
from torch import nn

from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.errors import UsageError


def check(config: TrialConfig, device: torch.device) -> None:
    """That the trial's runtime can run here, tried on the model's smallest size. UsageError where it cannot."""
    if config.evaluate.runtime != "sparse":
        return
    module = plugins.load("models", config.model.name)
    with torch.device("cpu"):
        small = module.build(module.Config(**module.SMALL), seed=0)
    _sparse(small.to(device), config)


def for_sampling(model: nn.Module, config: TrialConfig) -> nn.Module:
    """`model`, or what stands for it under `evaluate.runtime`; made anew whenever its weights have changed.

    auto: sparse where that can run. UsageError: sparse where it can't.
    """
    if config.evaluate.runtime == "dense":
        return model
    try:
        return _sparse(model, config)
    except UsageError:
        if config.evaluate.runtime == "sparse":
            raise
        return model


def _sparse(model: nn.Module, config: TrialConfig) -> nn.Module:
    name, module = config.model.name, plugins.load("models", config.model.name)
    if not hasattr(module, "sparse_runtime"):
        raise UsageError(
            f"evaluate.runtime 'sparse' has no kernels for model {name!r}; use 'dense', or 'auto', which is that here"
        )
    try:
        found: nn.Module = module.sparse_runtime(model)
    except UsageError as error:
        raise UsageError(f"evaluate.runtime 'sparse' cannot run here: {error}; or use 'dense' or 'auto'") from error
    return found

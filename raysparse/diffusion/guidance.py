"""Classifier-free guidance (Ho & Salimans 2022): a conditional prediction moved away from the unconditional one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guided(model: Callable[..., Tensor], scale: float, null_label: int) -> Callable[..., Tensor]:
    """A model whose eps is eps_null + scale (eps_label - eps_null); 1 is the model itself, 0 the null class alone.

    null_label: the class that stands for none. Both predictions come from one pass over a batch of twice the size.
    """

    def predict(x: Tensor, timesteps: Tensor, *, labels: Tensor, **cond: Any) -> Tensor:
        both = {name: torch.cat((value, value)) for name, value in cond.items()}
        null = torch.full_like(labels, null_label)
        eps = model(torch.cat((x, x)), torch.cat((timesteps, timesteps)), labels=torch.cat((labels, null)), **both)
        conditional, unconditional = eps.float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return predict

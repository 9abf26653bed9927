"""Units that a mask has emptied, removed from a transformer's block for sampling: what it computes stays the same.

Exact, as no norm lies between the two layers that share them. In the U-Nets a GroupNorm does, whose mean reads all
channels of a group, also those that nothing reads after it; their MLP of the timestep is one row per picture.

Share of U-ViT small/2's MLP neurons and heads that go, and of active weights that stay, random ERK masks:

    S     blocks of 8             16                  32                  64          single weights, diagonals, 2:4
    .90   .00  0/104  1.00   .07   0/104  .98   .38   2/104  .86   .69  62/104  .57   .00  0/104  1.00
    .95   .09  0/104   .97   .38   0/104  .86   .73  17/104  .65   .89  84/104  .36   .00  0/104  1.00

A prediction on a CPU (one thread, 4 pictures) is faster with them gone: 1.11, 1.13 and 1.73 times at S = .9 with blocks
of 16, 32 and 64, 1.14 and 1.43 at .95 with 16 and 32 (medians of 5 on cores in use; below 1.2 is within the noise).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def remove_neurons(first: nn.Linear, second: nn.Linear, activation: Callable[[Tensor], Tensor]) -> None:
    """Of second(activation(first(x))), in place; both have biases.

    What nothing reads goes. What reads nothing is a constant, which moves into the second bias. One neuron stays at
    least.
    """
    read, fed = second.weight.any(0), first.weight.any(1)
    constant = read & ~fed
    second.bias.add_(second.weight[:, constant] @ activation(first.bias[constant]))
    kept = _at_least_one(read & fed)
    if not bool((read & fed).any()):
        second.weight.zero_()  # the constant is in the bias already
    _keep_outputs(first, kept)
    _keep_inputs(second, kept)


@torch.no_grad()
def remove_heads(qkv: nn.Linear, proj: nn.Linear, heads: int) -> int:
    """Of self-attention, in place, where q, k and v are one layer without bias; returns how many stay, 1 at least.

    A head goes where nothing reads it or its v is 0: the softmax's average of zeros is 0, whatever its weights.
    """
    valued = qkv.weight.reshape(3, heads, -1)[2].any(1)
    read = proj.weight.T.reshape(heads, -1).any(1)
    kept = _at_least_one(valued & read)
    width = proj.in_features // heads
    _keep_outputs(qkv, kept.repeat_interleave(width).repeat(3))
    _keep_inputs(proj, kept.repeat_interleave(width))
    return int(kept.sum())


def _at_least_one(kept: Tensor) -> Tensor:
    if not bool(kept.any()):
        kept = kept.clone()
        kept[0] = True
    return kept


def _keep_outputs(layer: nn.Linear, kept: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[kept], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept], requires_grad=layer.bias.requires_grad)
    layer.out_features = len(layer.weight)


def _keep_inputs(layer: nn.Linear, kept: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[:, kept].contiguous(), requires_grad=layer.weight.requires_grad)
    layer.in_features = layer.weight.shape[1]

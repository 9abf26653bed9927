"""FLOPs of inference and training from the multiply-accumulates (MACs) of each weight.

Only weights of convolutions, linear layers and recurrent layers count; attention's own products, norms, biases and
activations do not (the papers' rule, reproduced to 3 digits: 1.92036e11 for one 3x64x64 latent of the 274M U-Net).
A sparse layer costs density x MACs.

Two conventions. TRUE: 2 FLOPs per MAC, training counts every example of a batch. The papers': the two models were
counted differently, and both leave the batch size out of training; LATENT_DIFFUSION is 2 FLOPs per MAC, CHIRODIFF 4.
A model's file names its own in `PAPER_CONVENTION`, a key of PAPER.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from raysparse.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True)
class Convention:
    """How MACs become FLOPs. Quote it with every number."""

    name: str  # "true" or "paper"
    flops_per_mac: float
    batch_in_training: bool  # False: a training step costs one example, whatever the batch
    update_apart: bool = True  # a topology update is a step between ΔTe others, as RigL counts; False: the last of them


TRUE = Convention("true", 2, True, update_apart=False)  # the optimizer steps with an update's dense gradient too
LATENT_DIFFUSION = Convention("paper", 2, False)  # Table 1: 3 F x epochs x ceil(N / batch)
CHIRODIFF = Convention("paper", 4, False)  # Table 2: 4 FLOPs per weight and point, 3 F x iterations
PAPER = {"latent_diffusion": LATENT_DIFFUSION, "chirodiff": CHIRODIFF}


def paper_convention(model: ModuleType) -> Convention:
    """The published convention of a model's file: its `PAPER_CONVENTION`, Latent Diffusion's where it has none."""
    name = getattr(model, "PAPER_CONVENTION", "latent_diffusion")
    if name not in PAPER:
        raise ValueError(unknown("paper convention", name, PAPER))
    return PAPER[name]


def forward_macs(model: nn.Module, inputs: Mapping[str, Any], batch: int) -> dict[str, float]:
    """MACs of one sample in one forward pass, by parameter name (0 for a weight that this forward leaves out).

    model: on any device, "meta" included: nothing is computed there. inputs: the forward's keyword arguments for
    `batch` samples. A module called twice counts twice; a recurrent layer counts the points it is given (packed
    data, or `lengths` if it takes them, else all), so with lengths the result is the mean over the batch.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    macs: dict[str, float] = {}
    hooks = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        uses = _uses(module, args, kwargs, output)
        for weight in _weights(module):
            macs[names[id(weight)]] += weight.numel() * uses / batch

    for module in model.modules():
        if weights := _weights(module):
            macs |= {names[id(weight)]: 0.0 for weight in weights}
            hooks.append(module.register_forward_hook(count, with_kwargs=True))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not any(macs.values()):
        raise UsageError("the model has no convolution, linear or recurrent layer to count FLOPs of")
    return macs


def forward_flops(
    macs: Mapping[str, float], densities: Mapping[str, float] | None = None, convention: Convention = TRUE
) -> float:
    """F: FLOPs of one sample's forward pass. densities: parameter name -> density; a name not in it is dense."""
    density = densities or {}
    strangers = sorted(density.keys() - macs.keys())
    if strangers:
        raise ValueError(f"densities for what is no weight of a counted layer: {', '.join(strangers[:5])}")
    return convention.flops_per_mac * sum(count * density.get(name, 1.0) for name, count in macs.items())


def inference(
    macs: Mapping[str, float],
    densities: Mapping[str, float] | None = None,
    *,
    ddim_steps: int,
    convention: Convention = TRUE,
) -> float:
    """flops_inference ("Test"): one sample, F x ddim_steps."""
    return forward_flops(macs, densities, convention) * ddim_steps


def train(
    macs: Mapping[str, float],
    densities: Mapping[str, float] | None = None,
    *,
    steps: int,
    batch_size: int,
    convention: Convention = TRUE,
    dense_gradient_interval: float | None = None,
    dense_gradients: int = 1,
) -> float:
    """flops_train ("Train"): 3 F per optimizer step (forward, gradient of the inputs, gradient of the weights).

    batch_size: examples per optimizer step over all workers. dense_gradient_interval: ΔTe of a method that grows by
    the dense gradient (RigL), None for others; then RigL's amortised share of dense training applies (its appendix H),
    with the period of the convention. dense_gradients: how many steps of each interval need it (RigL: 1).
    """
    dense = 3 * forward_flops(macs, None, convention)
    sparse = 3 * forward_flops(macs, densities, convention)
    share = sparse / dense
    if dense_gradient_interval is not None:
        share = rigl_share(share, dense_gradient_interval + convention.update_apart, dense_gradients)
    return dense * share * steps * (batch_size if convention.batch_in_training else 1)


def rigl_share(ratio: float, period: float, dense_gradients: int = 1) -> float:
    """(3 r (P - W) + W (2 r + 1)) / (3 P): training FLOPs over dense, where ratio r is sparse F over dense F.

    W, dense_gradients, of each P steps, period, have a dense weight gradient. RigL's own: P = ΔT + 1 and W = 1.
    """
    if period < 1:
        raise ValueError(f"the period of dense gradients is at least 1 step, got {period}")
    count = min(dense_gradients, period)
    return (3 * ratio * (period - count) + count * (2 * ratio + 1)) / (3 * period)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SIMPLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
_RECURRENT = ("weight_ih", "weight_hh", "weight_hr")  # nn.GRU, LSTM, RNN, their cells, own modules with these names


def _weights(module: nn.Module) -> list[torch.Tensor]:
    """The matrices and kernels of one module; empty for what is not counted."""
    if isinstance(module, _SIMPLE):
        return [module.weight]
    if isinstance(module, nn.MultiheadAttention):
        raise UsageError(
            "an nn.MultiheadAttention uses its weights without calling its layers, so their FLOPs cannot be seen; "
            "build the attention from nn.Linear layers"
        )
    return [weight for name, weight in module.named_parameters(recurse=False) if name.startswith(_RECURRENT)]


def _uses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
    """How often each number of a called module's weights was used, over the whole batch."""
    given = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(module, _SIMPLE):
        return _points(given, args[1:], kwargs)
    if isinstance(module, nn.Linear):
        return float(given.numel() / module.in_features)
    if isinstance(module, _TRANSPOSED):  # each number once per input position, also with groups
        return float(given.numel() / module.in_channels)
    return float(output.numel() / module.out_channels)  # a convolution: once per output position, also with groups


def _points(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Points that a recurrent layer was given: packed data, the sum of an integer tensor `lengths`, or all."""
    if isinstance(given, PackedSequence):
        return float(given.data.shape[0])
    lengths = kwargs.get("lengths", next((a for a in args if torch.is_tensor(a) and not a.is_floating_point()), None))
    if torch.is_tensor(lengths) and not lengths.is_meta:
        return float(lengths.sum())
    return float(given.numel() / given.shape[-1])

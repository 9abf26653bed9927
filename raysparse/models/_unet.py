"""What the two U-Nets for images share: settings that fit together, weights from a seed, allocation, forward.

The networks themselves are diffusers', under the name `unet`, so that their state can be exported as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.models import _float32_layers
from raysparse.section import Section

Model = TypeVar("Model", bound=nn.Module)
Widths = Annotated[tuple[int, ...], Field(min_length=1, max_length=16)]  # channels per level; see check_levels
MOST_CHANNELS = 8192


class UNetConfig(Section):
    """The settings of both U-Nets; each file has its own defaults. Names are diffusers'."""

    sample_size: int = Field(ge=1, le=4096)  # height and width of x
    in_channels: int = Field(3, ge=1, le=4096)  # of x, and of the prediction
    block_out_channels: Widths  # per level, the finest first
    layers_per_block: int = Field(2, ge=1, le=64)  # residual blocks per level on the way down; one more on the way up
    attention_levels: tuple[bool, ...]  # which levels have attention; the middle always has
    attention_head_dim: int | None = Field(None, ge=1)  # channels per head; None: one head of all channels
    norm_num_groups: int = Field(32, ge=1)  # every level's channels must be a multiple

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        check_levels(self.block_out_channels, self.attention_levels, self.norm_num_groups)
        halvings = len(self.block_out_channels) - 1
        if self.sample_size % 2**halvings:
            raise ValueError(
                f"sample_size {self.sample_size} cannot be halved {halvings} times, once between each two levels; take "
                f"a multiple of {2**halvings}"
            )
        attending = zip(self.block_out_channels, self.attention_levels, strict=True)
        widths = [width for width, has in attending if has] + [self.block_out_channels[-1]]
        for width in widths if self.attention_head_dim else ():
            if width % (self.attention_head_dim or 1):
                raise ValueError(
                    f"a level with attention has {width} channels, no multiple of attention_head_dim "
                    f"{self.attention_head_dim}; change one of them"
                )
        return self


def check_levels(widths: Sequence[int], attends: Sequence[bool], groups: int) -> None:
    """ValueError (for pydantic) where the levels of a network do not fit together."""
    if len(attends) != len(widths):
        raise ValueError(
            f"attention_levels has {len(attends)} entries, block_out_channels {len(widths)}; give each level both"
        )
    for width in widths:
        if width > MOST_CHANNELS:
            raise ValueError(f"block_out_channels has {width}, above the limit of {MOST_CHANNELS}; lower it")
        if width < 1 or width % groups:
            raise ValueError(
                f"block_out_channels has {width}, no positive multiple of norm_num_groups {groups}; lower "
                "norm_num_groups or change the width"
            )


class UNet(nn.Module):
    """Base of the denoisers for images. A subclass sets `config`, `unet` and forwards to `_predict`."""

    config: UNetConfig
    unet: nn.Module
    null_label: int | None = None  # the class that stands for no class; None: the model has no classes

    @property
    def allocation_groups(self) -> list[list[str]]:
        """q, k and v of each self-attention: one tensor to allocation, joined along n_out (PAPER: cost accounting)."""
        modules = dict(self.named_modules())
        return [
            [f"{name}.{part}.weight" for part in ("to_q", "to_k", "to_v")]
            for name in modules
            if hasattr(modules[name], "to_q") and not modules[name].is_cross_attention
        ]

    @property
    def allocation_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> the shape that allocation sees, where it is not the weight's."""
        return {}

    def _predict(self, x: Tensor, timesteps: Tensor, **context: Tensor) -> Tensor:
        """float32 like x, also under autocast. UsageError: an x that does not fit the network."""
        _check_shape(self.config, x)
        prediction: Tensor = self.unet(x, timesteps, return_dict=False, **context)[0]
        return prediction.float()


def with_float32_output(unet: nn.Module) -> nn.Module:
    """diffusers' network, its last convolution in float32 under autocast too: see _float32_layers."""
    old = unet.conv_out
    assert isinstance(old, nn.Conv2d)
    assert (old.kernel_size, old.padding) == ((3, 3), (1, 1))
    unet.conv_out = _float32_layers.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
    return unet


def from_seed(make: Callable[[], Model], seed: int, zeroed: Callable[[str], bool]) -> Model:
    """`make()` on the default device, with weights that are a function of its structure and the seed alone.

    Convolutions and linear layers are uniform within 1/sqrt(fan in) as PyTorch's own, biases too; embeddings are
    N(0, 1); norms 1 and 0. zeroed: module name -> whether its weight and bias start at 0. Nothing is drawn on the meta
    device, and nothing from a global generator anywhere: the modules' own initialisation runs on meta.
    """
    with torch.device("meta"):
        model = make()
    device = torch.get_default_device()
    if device.type != "meta":
        _initialise(model.to_empty(device=device), zeroed, rng.generator(seed, "model"))
    return model


@torch.no_grad()
def _initialise(model: nn.Module, zeroed: Callable[[str], bool], generator: torch.Generator) -> None:
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and zeroed(name):
            for parameter in own:
                parameter.zero_()
        elif own:
            initialise_module(module, generator)


@torch.no_grad()
def initialise_module(module: nn.Module, generator: torch.Generator) -> None:
    """One layer's own parameters, by its kind. TypeError: a kind that has no initialisation here."""
    if isinstance(module, nn.Embedding):
        draw(module.weight, lambda values: values.normal_(generator=generator))
    elif isinstance(module, nn.Conv2d | nn.Linear):
        bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
        for parameter in module.parameters(recurse=False):
            draw(parameter, functools.partial(_uniform, bound=bound, generator=generator))
    elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
        module.weight.fill_(1.0)
        module.bias.zero_()
    else:
        raise TypeError(f"a {type(module).__name__} has weights of a kind that has no initialisation here")


def check_labels(labels: Tensor | None, classes: int | None) -> None:
    """UsageError where labels and a model's num_classes do not go together."""
    if labels is not None and classes is None:
        raise UsageError(
            "the model has no classes but was given labels; set its option num_classes, or use data without labels"
        )
    if labels is None and classes is not None:
        raise UsageError(f"the model has num_classes={classes} but was given no labels; use a data set with labels")
    if labels is None or classes is None or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return  # on a GPU a look at the values would wait for it; there and compiled, the embedding refuses them
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > classes:
        raise UsageError(
            f"labels must be in 0 .. {classes} ({classes} is the null class), got {low if low < 0 else high}; "
            "raise num_classes"
        )


def _uniform(values: Tensor, bound: float, generator: torch.Generator) -> None:
    values.uniform_(-bound, bound, generator=generator)


def draw(parameter: Tensor, fill: Callable[[Tensor], Any]) -> None:
    """Always drawn on the CPU: a GPU's generator gives other numbers."""
    if parameter.device.type == "cpu":
        fill(parameter)
    else:
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        fill(values)
        parameter.copy_(values)


def block_types(kind: str, attends: Iterable[bool], with_attention: str, without: str) -> tuple[str, ...]:
    """diffusers' names of the blocks per level: `block_types("Down", ...)` gives e.g. ("DownBlock2D", ...)."""
    return tuple(f"{with_attention if has else without}{kind}Block2D" for has in attends)


def example_inputs(config: UNetConfig, batch: int, device: str) -> dict[str, Tensor]:
    """x and timesteps of a forward pass, all 0."""
    size = config.sample_size
    return {
        "x": torch.zeros(batch, config.in_channels, size, size, device=device),
        "timesteps": torch.zeros(batch, dtype=torch.int64, device=device),
    }


def _check_shape(config: UNetConfig, x: Tensor) -> None:
    multiple = 2 ** (len(config.block_out_channels) - 1)
    if x.ndim != 4 or x.shape[1] != config.in_channels or x.shape[2] % multiple or x.shape[3] % multiple:
        raise UsageError(
            f"the model takes x of shape [B, {config.in_channels}, H, W] with H and W multiples of {multiple}, got "
            f"{list(x.shape)}; set its options in_channels and block_out_channels to fit the data"
        )

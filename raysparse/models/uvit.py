"""U-ViT (Bao et al., CVPR 2023), which SparseDM makes sparse: a transformer whose early and late blocks are joined.

The time, the class and the patches of a picture are all tokens. 44,255,328 parameters at CIFAR-10's setting (the
defaults), 44,292,228 at CelebA-64's, 286,763,172 at ImageNet's large/2 on latents of 4 x 32 x 32.

Dense, as in SparseDM: the patch embedding, the skips, the decoder head and the last convolution (`keep_dense`). q, k
and v are one linear layer, and sparse with proj, fc1 and fc2.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.models import _dead_units, _float32_layers, _unet
from raysparse.models._sparse_product_training import SparseStep
from raysparse.models._sparse_products import with_sparse_products
from raysparse.section import Section

KIND = "denoiser"
PAPER_CONVENTION = "latent_diffusion"  # of raysparse.metrics.flops: 2 FLOPs per MAC
SMALL: dict[str, Any] = {  # a Config for tests of what every model must do
    "sample_size": 8,
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}

# The published settings beside the defaults, as options.
CELEBA64: dict[str, Any] = {"sample_size": 64, "patch_size": 4}
IMAGENET256_LARGE: dict[str, Any] = {
    "in_channels": 4,
    "embed_dim": 1024,
    "depth": 20,
    "num_heads": 16,
    "num_classes": 1000,
}


class Config(Section):
    """The defaults are U-ViT small/2 for CIFAR-10 (44,255,328 parameters)."""

    sample_size: int = Field(32, ge=1, le=4096)  # height and width of x
    in_channels: int = Field(3, ge=1, le=4096)  # of x, and of the prediction
    patch_size: int = Field(2, ge=1)  # a token is a square of so many values each way
    embed_dim: int = Field(512, ge=4, le=8192)  # width of a token, even
    depth: int = Field(12, ge=2, le=128)  # blocks beside the middle one, half of them before it; even
    num_heads: int = Field(8, ge=1)
    mlp_ratio: int = Field(4, ge=1, le=64)  # the MLP's width in tokens' widths
    num_classes: int | None = Field(None, ge=1, le=10**6)  # real classes of a conditional model; None: unconditional

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is no multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads or self.embed_dim % 2:
            raise ValueError(f"embed_dim {self.embed_dim} must be even and a multiple of num_heads {self.num_heads}")
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} must be even: each block before the middle is joined to one after it")
        return self


def build(config: Config, seed: int) -> UViT:
    """A model on the default device; its weights are a function of (config, seed) alone.

    As the original: linear layers and positions are normal with deviation .02, cut at 2, biases 0; convolutions are
    PyTorch's own, the class embedding N(0, 1).
    """
    with torch.device("meta"):
        model = UViT(config)
    device = torch.get_default_device()
    if device.type != "meta":
        _initialise(model.to_empty(device=device), rng.generator(seed, "model"))
    return model


def example(config: Config, batch: int, points: int, device: str = "cpu") -> dict[str, Tensor]:
    """Keyword arguments of a forward pass over `batch` images, all 0; images have no points."""
    given = {
        "x": torch.zeros(batch, config.in_channels, config.sample_size, config.sample_size, device=device),
        "timesteps": torch.zeros(batch, dtype=torch.int64, device=device),
    }
    if config.num_classes is not None:
        given["labels"] = torch.zeros(batch, dtype=torch.int64, device=device)
    return given


sparse_runtime = with_sparse_products
sparse_step = SparseStep


class UViT(nn.Module):
    """forward(x float32 [B, C, S, S], timesteps int64 [B], labels int64 [B]) -> float32 [B, C, S, S], the eps."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, half = config.embed_dim, config.depth // 2
        self.null_label = config.num_classes  # the class beyond the real ones stands for none
        self.keep_dense = ("patch_embed", "decoder", "last", *(f"late.{index}.skip" for index in range(half)))
        self.extras = 1 if config.num_classes is None else 2  # tokens that are no patches
        tokens = self.extras + (config.sample_size // config.patch_size) ** 2
        self.patch_embed = nn.Conv2d(config.in_channels, width, config.patch_size, stride=config.patch_size)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.early = nn.ModuleList(Block(config) for _ in range(half))
        self.middle = Block(config)
        self.late = nn.ModuleList(Block(config, joined=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder = _float32_layers.Linear(width, config.patch_size**2 * config.in_channels)
        self.last = _float32_layers.Conv2d(config.in_channels, config.in_channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """labels: in 0 .. num_classes, where num_classes is the null class; where, and only where, there are classes.

        The prediction is float32 also under autocast. UsageError: labels, or an x that does not fit the network.
        """
        self._check(x, labels)
        patches = self.patch_embed(x).flatten(2).mT
        first = [time_embedding(timesteps, self.config.embed_dim).to(patches.dtype)]
        if labels is not None:
            first.insert(0, self.class_embedding(labels).to(patches.dtype))
        tokens = torch.cat((torch.stack(first, 1), patches), 1) + self.positions
        skips = []
        for block in self.early:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.middle(tokens)
        for block in self.late:
            tokens = block(tokens, skips.pop())
        pixels = self.decoder(self.norm(tokens))[:, self.extras :]
        prediction: Tensor = self.last(_unpatched(pixels, self.config))
        return prediction.float()

    def remove_dead_units(self) -> None:
        """In place, neurons and heads that the zeros have emptied; the prediction stays the same, to rounding."""
        for block in (*self.early, self.middle, *self.late):
            block.remove_dead_units()

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        size, classes = self.config.sample_size, self.config.num_classes
        if tuple(x.shape[1:]) != (self.config.in_channels, size, size):
            raise UsageError(
                f"the model takes x of shape [B, {self.config.in_channels}, {size}, {size}], got {list(x.shape)}; set "
                "its options sample_size and in_channels to fit the data"
            )
        _unet.check_labels(labels, classes)


class Block(nn.Module):
    """Attention and MLP over tokens [B, L, D], each added to its input; a late block first takes in an early one's."""

    mlp: ClassVar = ("fc1", "activation", "fc2")  # what goes from one to the next goes nowhere else

    def __init__(self, config: Config, joined: bool = False) -> None:
        super().__init__()
        width = config.embed_dim
        self.heads = config.num_heads
        self.skip = nn.Linear(2 * width, width) if joined else None
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.mlp_ratio * width)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(config.mlp_ratio * width, width)

    def forward(self, tokens: Tensor, early: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            assert early is not None
            tokens = self.skip(torch.cat((tokens, early), -1))
        tokens = tokens + self._attention(self.norm1(tokens))
        found: Tensor = tokens + self.fc2(self.activation(self.fc1(self.norm2(tokens))))
        return found

    def remove_dead_units(self) -> None:
        _dead_units.remove_neurons(self.fc1, self.fc2, self.activation)
        self.heads = _dead_units.remove_heads(self.qkv, self.proj, self.heads)

    def _attention(self, tokens: Tensor) -> Tensor:
        # Of one permuted view a compiled step by blocks would write the gradient twice.
        parts = self.qkv(tokens).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, heads, L, D / heads]
        found: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return found


def time_embedding(timesteps: Tensor, width: int) -> Tensor:
    """float32 [B, width]: cosines, then sines, of t at frequencies from 1 down to 1e-4 (DDPM's)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10_000) / half))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def _unpatched(pixels: Tensor, config: Config) -> Tensor:
    """[B, patches, P x P x C] -> [B, C, S, S]."""
    side, patch = config.sample_size // config.patch_size, config.patch_size
    cut = pixels.reshape(-1, side, side, patch, patch, config.in_channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, config.in_channels, config.sample_size, config.sample_size)


@torch.no_grad()
def _initialise(model: UViT, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _unet.draw(module.weight, lambda values: _normal(values, generator))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Conv2d | nn.Embedding | nn.LayerNorm):
            _unet.initialise_module(module, generator)
    _unet.draw(model.positions, lambda values: _normal(values, generator))


def _normal(values: Tensor, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(values, std=0.02, generator=generator)  # cut at 2, a hundred deviations: not at all

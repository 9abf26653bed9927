"""The U-Net of Latent Diffusion (Rombach et al., CVPR 2022), from diffusers' parts.

Unconditional: UNet2DModel at the setting of celebahq-ldm-vq-4, which LSUN-Bedrooms and Imagenette use too: 274,056,163
parameters, the same function as the original's (output difference 5e-6 with copied weights, PAPER: Latent Diffusion).
Conditional (num_classes): UNet2DConditionModel, whose cross-attention sees one token, the embedded class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from raysparse.models import _unet
from raysparse.models._sparse_product_training import SparseStep
from raysparse.models._sparse_products import with_sparse_products

KIND = "denoiser"
PAPER_CONVENTION = "latent_diffusion"  # of raysparse.metrics.flops
SMALL: dict[str, Any] = {  # a Config for tests of what every model must do
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}

# The original's configs for class-conditional ImageNet, as options. The sparse paper's first stage has f = 4 for every
# data set (its section 4), so its conditional model is the first.
CIN256_V2: dict[str, Any] = {  # 400,920,579 parameters without the class embedding, 401,433,091 with it
    "block_out_channels": (192, 384, 576, 960),
    "attention_head_dim": None,  # its num_heads: 1
    "num_classes": 1000,
}
CIN_LDM_VQ_F8: dict[str, Any] = {  # 394,984,196 without the class embedding, 395,496,708 with it
    "sample_size": 32,
    "in_channels": 4,
    "block_out_channels": (256, 512, 1024),
    "attention_levels": (True, True, True),
    "num_classes": 1000,
}


class Config(_unet.UNetConfig):
    """The defaults are the paper's for CelebA-HQ, LSUN-Bedrooms and Imagenette (274,056,163 parameters)."""

    sample_size: int = Field(64, ge=1, le=4096)  # 256 px pictures under VQ-f4
    block_out_channels: _unet.Widths = (224, 448, 672, 896)
    attention_levels: tuple[bool, ...] = (False, True, True, True)  # the original's attention_resolutions 8, 4, 2
    attention_head_dim: int | None = Field(32, ge=1)
    num_classes: int | None = Field(None, ge=1, le=10**6)  # real classes of a conditional model; None: unconditional
    context_dim: int = Field(512, ge=1, le=8192)  # width of a class's embedding; unused without classes


def build(config: Config, seed: int) -> LatentUNet:
    """A model on the default device; its weights are a function of (config, seed) alone."""
    return _unet.from_seed(lambda: LatentUNet(config), seed, zeroed=_zeroed(config))


def example(config: Config, batch: int, points: int, device: str = "cpu") -> dict[str, Tensor]:
    """Keyword arguments of a forward pass over `batch` images, all 0; images have no points."""
    given = _unet.example_inputs(config, batch, device)
    if config.num_classes is not None:
        given["labels"] = torch.zeros(batch, dtype=torch.int64, device=device)
    return given


sparse_runtime = with_sparse_products
sparse_step = SparseStep


class LatentUNet(_unet.UNet):
    """forward(x float32 [B, C, H, W], timesteps int64 [B], labels int64 [B]) -> float32 [B, C, H, W], the eps.

    unet: diffusers' UNet2DModel, or UNet2DConditionModel where the model has classes. class_embedding: the original's
    ClassEmbedder, num_classes + 1 vectors, the last for the null class; trained, but dense as every embedding.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        network = _unconditional(config) if config.num_classes is None else _conditional(config)
        self.unet = _unet.with_float32_output(network)
        if config.num_classes is not None:
            self.null_label = config.num_classes
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.context_dim)

    @property
    def allocation_groups(self) -> list[list[str]]:
        """q, k and v of each self-attention, as the issue has it; the names are parameters'.

        In the unconditional original they are one tensor. In its SpatialTransformer they are three, but of the same
        n_in, and joined they are allocated as in the unconditional model. Cross-attention's cannot be joined along
        n_out: q reads the image (n_in is the level's width), k and v the class (n_in is context_dim).
        """
        return super().allocation_groups

    @property
    def allocation_shapes(self) -> dict[str, tuple[int, ...]]:
        """The unconditional original's attention projections are Conv1d of kernel 1, with a kernel's axis for ERK.

        With it the FLOPs ratio at S = .75 is .28844 (the paper prints .2884), with a Linear's shape .28846. In the
        conditional original they are Linear, as here.
        """
        if self.config.num_classes is not None:
            return {}
        projections = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
        return {name: (*p.shape, 1) for name, p in self.named_parameters() if name.endswith(projections)}

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """labels: in 0 .. num_classes, where num_classes is the null class; where, and only where, there are classes.

        The prediction is float32 also under autocast. UsageError: labels, or an x that does not fit the network.
        """
        _unet.check_labels(labels, self.config.num_classes)
        if labels is None:
            return self._predict(x, timesteps)
        # One token: its softmax is 1 whatever q and k are, so cross-attention's to_q and to_k get rounding as gradient.
        return self._predict(x, timesteps, encoder_hidden_states=self.class_embedding(labels)[:, None])


def _zeroed(config: Config) -> Callable[[str], bool]:
    """Which modules start at 0, the original's zero_module: each branch that is added to a stream starts as nothing.

    The last convolution of each residual block, each attention's output projection (of the whole SpatialTransformer
    where there is cross-attention) and the last convolution: 39 weights with 90.3M numbers at the defaults.
    """
    last = (".conv2", ".to_out.0" if config.num_classes is None else ".proj_out")
    return lambda name: name.endswith(last) or name == "unet.conv_out"


def _common(config: Config) -> dict[str, Any]:
    return {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def _unconditional(config: Config) -> nn.Module:
    from diffusers import UNet2DModel

    attends = config.attention_levels
    network: nn.Module = UNet2DModel(
        down_block_types=_unet.block_types("Down", attends, "Attn", ""),
        up_block_types=_unet.block_types("Up", reversed(attends), "Attn", ""),
        attention_head_dim=config.attention_head_dim,
        **_common(config),
    )
    return network


def _conditional(config: Config) -> nn.Module:
    from diffusers import UNet2DConditionModel

    attends, widths = config.attention_levels, config.block_out_channels
    heads = [max(1, width // (config.attention_head_dim or width)) for width in widths]
    network: nn.Module = UNet2DConditionModel(
        down_block_types=_unet.block_types("Down", attends, "CrossAttn", ""),
        up_block_types=_unet.block_types("Up", reversed(attends), "CrossAttn", ""),
        attention_head_dim=tuple(heads),  # diffusers' name is wrong here: it takes the number of heads per level
        cross_attention_dim=config.context_dim,
        **_common(config),
    )
    return network

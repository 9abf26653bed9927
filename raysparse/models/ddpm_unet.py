"""The U-Net of DDPM (Ho et al., NeurIPS 2020) for CIFAR-10, as SparseDM uses it: google/ddpm-cifar10-32 of diffusers.

35,746,307 parameters and 6.05 GMACs for one 3x32x32 image (SparseDM, Table 1).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator
from torch import Tensor, nn

from raysparse.errors import UsageError
from raysparse.models import _unet
from raysparse.models._sparse_product_training import SparseStep
from raysparse.models._sparse_products import with_sparse_products

KIND = "denoiser"
PAPER_CONVENTION = "latent_diffusion"  # of raysparse.metrics.flops: 2 FLOPs per MAC
SMALL: dict[str, Any] = {  # a Config for tests of what every model must do
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "norm_num_groups": 4,
}


class Config(_unet.UNetConfig):
    """The defaults are the published network's for CIFAR-10 (35,746,307 parameters)."""

    sample_size: int = Field(32, ge=1, le=4096)
    block_out_channels: _unet.Widths = (128, 256, 256, 256)
    attention_levels: tuple[bool, ...] = (False, True, False, False)  # at 16 x 16

    @field_validator("block_out_channels")
    @classmethod
    def _has_frequencies(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if widths[0] < 4:  # of 2 and 3 diffusers makes one frequency, by 0 / 0
            raise ValueError(
                f"block_out_channels begins with {widths[0]}, which is also the width of the time features: they are "
                "NaN below 4"
            )
        return widths


def build(config: Config, seed: int) -> DDPMUNet:
    """A model on the default device; its weights are a function of (config, seed) alone."""
    return _unet.from_seed(lambda: DDPMUNet(config), seed, zeroed=_zeroed)


def example(config: Config, batch: int, points: int, device: str = "cpu") -> dict[str, Tensor]:
    """Keyword arguments of a forward pass over `batch` images, all 0; images have no points."""
    return _unet.example_inputs(config, batch, device)


sparse_runtime = with_sparse_products
sparse_step = SparseStep


class DDPMUNet(_unet.UNet):
    """forward(x float32 [B, C, H, W], timesteps int64 [B]) -> float32 [B, C, H, W], the eps. It has no classes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.unet = _unet.with_float32_output(_network(config))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction is float32 also under autocast. UsageError: labels, or an x that does not fit the network."""
        if labels is not None:
            raise UsageError("ddpm_unet has no classes but was given labels; use data without labels, or latent_unet")
        return self._predict(x, timesteps)


def _zeroed(name: str) -> bool:
    """The original's init_scale=0: last convolution of a residual block, attention's output, the last convolution."""
    return name.endswith((".conv2", ".to_out.0")) or name == "unet.conv_out"


def _network(config: Config) -> nn.Module:
    from diffusers import UNet2DModel

    attends = config.attention_levels
    network: nn.Module = UNet2DModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=_unet.block_types("Down", attends, "Attn", ""),
        up_block_types=_unet.block_types("Up", reversed(attends), "Attn", ""),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return network

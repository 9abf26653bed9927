"""The first stage of Latent Diffusion: VQ-f4, which turns pictures into latents and back (Rombach et al., CVPR 2022).

diffusers' VQModel at the setting of ldm-celebahq-256, 55,322,782 parameters, trained elsewhere and frozen here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysparse.errors import UsageError
from raysparse.models import _unet
from raysparse.section import Section

KIND = "first_stage"
SMALL: dict[str, Any] = {  # a Config for tests: f = 2
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_levels": (False, False),
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
}


class Config(Section):
    """The defaults are CompVis' vq-f4 (models/first_stage_models/vq-f4/config.yaml). Names are diffusers'.

    vq-f8 of cin-ldm-vq-f8: block_out_channels (128, 256, 256, 512), attention at the last level, latent_channels and
    vq_embed_dim 4, num_vq_embeddings 16384.
    """

    block_out_channels: _unet.Widths = (128, 256, 512)  # n levels: f = 2 ** (n - 1)
    layers_per_block: int = Field(2, ge=1, le=64)  # residual blocks per level of the encoder; the decoder has one more
    attention_levels: tuple[bool, ...] = (False, False, False)  # beside the middle, which always has attention
    latent_channels: int = Field(3, ge=1, le=4096)  # the original's z_channels
    vq_embed_dim: int = Field(3, ge=1, le=4096)  # channels of a latent and of a code; the original's embed_dim
    num_vq_embeddings: int = Field(8192, ge=1, le=10**6)  # vectors of the codebook
    norm_num_groups: int = Field(32, ge=1)
    # z = scaling_factor * encoder's output. The original has none for VQ; diffusers divides by .18215 before decoding
    # where a folder's config lacks it, which the published one does. So a folder's value is never read.
    scaling_factor: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        _unet.check_levels(self.block_out_channels, self.attention_levels, self.norm_num_groups)
        return self

    @property
    def channels(self) -> int:
        """c, of a latent."""
        return self.vq_embed_dim

    @property
    def factor(self) -> int:
        """f: a picture is so many times as high and wide as its latent."""
        return 1 << (len(self.block_out_channels) - 1)


def build(config: Config, seed: int) -> Autoencoder:
    """Random weights on the default device, a function of (config, seed) alone; they serve tests only.

    The codebook is N(0, 1), wider than the original's U(-1/n, 1/n): untrained, that one would decode all alike.
    """
    return _unet.from_seed(lambda: Autoencoder(config), seed, zeroed=lambda name: False)


def load(weights: str, config: Config) -> Autoencoder:
    """Trained weights, on the CPU as float32. Nothing in a file is executed.

    weights: a folder of diffusers (a VQModel, or a pipeline with one in `vqvae` or `vae`), a CompVis model.ckpt of a
    first stage, or a Hub id `organisation/name` (downloaded once). UsageError: none of these, another architecture
    than the config's, a key or shape too many or too few (it is named), a file that does not hold plain tensors.
    """
    from raysparse.models import _vq_weights

    with torch.device("meta"):
        model = Autoencoder(config)
    state = _vq_weights.read(weights, config, model.vq.state_dict())
    model.vq.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False)


def identity(model: Autoencoder) -> str:
    """sha256 of the architecture and of all weights, hex: two first stages with the same make the same latents."""
    digest = hashlib.sha256(json.dumps(model.config.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().float().cpu().contiguous()
        digest.update(f"\n{name} {list(values.shape)}\n".encode())
        digest.update(memoryview(values.numpy()).cast("B"))
    return digest.hexdigest()


class Autoencoder(nn.Module):
    """encode: x float32 [B, 3, H, W] in [-1, 1] -> z [B, c, H/f, W/f], not quantised. decode: z -> x, quantised first.

    Frozen: no weight requires a gradient. vq: diffusers' VQModel.
    """

    vq: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vq = _network(config)
        self.requires_grad_(False)
        self.eval()

    def encode(self, x: Tensor) -> Tensor:
        """Latents before quantisation, as the diffusion model is trained on. UsageError: an x of another shape."""
        factor = self.config.factor
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % factor or x.shape[3] % factor:
            raise UsageError(
                f"the first stage takes pictures [B, 3, H, W] with H and W multiples of {factor}, got {list(x.shape)}; "
                "resize them (the data set's option size_px)"
            )
        latents: Tensor = self.vq.encode(x, return_dict=False)[0]
        return latents * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Pictures, mostly in [-1, 1]. UsageError: a z of another shape."""
        if z.ndim != 4 or z.shape[1] != self.config.channels:
            raise UsageError(
                f"the first stage decodes latents [B, {self.config.channels}, h, w], got {list(z.shape)}; were "
                "they made by another one?"
            )
        z = z / self.config.scaling_factor
        # One picture at a time: the distances to all 8192 vectors take 134 MB for one of 64x64 latents.
        nearest = torch.cat([self.vq.quantize(one)[0] for one in torch.split(z, 1)])
        pictures: Tensor = self.vq.decode(nearest, force_not_quantize=True, return_dict=False)[0]
        return pictures


def _network(config: Config) -> nn.Module:
    from diffusers import VQModel

    network: nn.Module = VQModel(**arguments(config))
    return network


def arguments(config: Config) -> dict[str, Any]:
    """What diffusers' VQModel is made with."""
    attends = config.attention_levels
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attends)),
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "num_vq_embeddings": config.num_vq_embeddings,
        "norm_num_groups": config.norm_num_groups,
        "vq_embed_dim": config.vq_embed_dim,
        "norm_type": "group",
        "mid_block_add_attention": True,
        "scaling_factor": config.scaling_factor,
    }

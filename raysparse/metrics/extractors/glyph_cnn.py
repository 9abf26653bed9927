"""A small convolutional network that tells the 1,240 glyphs of the Hershey fonts apart; its weights are in the package.

Five convolutions, 328,000 weights. Features are the channel means of the last three, each divided by its spread over
the glyphs: undivided, the last layer drowns the others and a half trained model is told from a well trained one by 5
standard deviations instead of 20 (hershey). With random weights untrained models rank before half trained ones there.
Made by `python benchmarks/train_glyph_cnn.py`, judged by `python benchmarks/extractor_ranking.py`. A FID over these
features is not the FID of any paper and not comparable with one: write it "FID (glyph_cnn)".
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from raysparse.errors import UsageError
from raysparse.files import sha256
from raysparse.metrics.extractors._base import gray, load_state, misfit

NEEDS_WEIGHTS = False
DOWNLOADS = False

SIZE_PX = 64
CHANNELS = (24, 64, 96, 128, 128)
STRIDES = (2, 2, 2, 1, 2)
TAPS = (2, 3, 4)  # which convolutions' means are features
WEIGHTS = Path(__file__).with_name("glyph_cnn.safetensors")  # float16, normalisation folded into the convolutions
SCALE = "scale"
WHAT = "the weights of glyph_cnn"
_IN_CACHE = 64  # images at a time on a CPU: 10,000 take 3.5 s, 4.5 by 256; without channels_last 4.0 and 6.8


class GlyphCNN:
    """uint8 [B, 1 or 3, H, W] -> float32 [B, 352]; other sizes than 64 are resized (bilinear, antialiased)."""

    name = "glyph_cnn"
    layer = "means of convolutions 3-5"
    feature_dim = sum(CHANNELS[index] for index in TAPS)
    resize = f"bilinear {SIZE_PX}"

    def __init__(self, weights: Path, device: str) -> None:
        self.network = convolutions()
        state = {name: value.float() for name, value in load_state(weights, WHAT).items()}
        scale = state.pop(SCALE, torch.zeros(0))
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise misfit(weights, WHAT, error) from error
        if scale.shape != (self.feature_dim,):
            raise UsageError(f"{weights} does not hold {WHAT}: no `scale` of {self.feature_dim}; get the right file")
        self.scale = scale.to(device)
        self.weights_hash = sha256(weights)
        self.network.requires_grad_(False).eval().to(memory_format=torch.channels_last).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        at_a_time = _IN_CACHE if self.device == "cpu" else len(images)
        return torch.cat([self._features(part) for part in torch.split(images, max(1, at_a_time))])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = 1 - gray(images.to(self.device))
        if x.shape[-2:] != (SIZE_PX, SIZE_PX):
            x = F.interpolate(x, (SIZE_PX, SIZE_PX), mode="bilinear", antialias=True)
        features = []
        for index, convolution in enumerate(self.network):
            x = F.relu(convolution(x))
            if index in TAPS:
                features.append(x.mean(dim=(2, 3)))
        scaled: torch.Tensor = torch.cat(features, dim=1) * self.scale
        return scaled


def build(weights: Path | None = None, device: str = "cpu") -> GlyphCNN:
    """The extractor on `device`, with the package's weights or others of the same architecture."""
    return GlyphCNN(weights or WEIGHTS, device)


def convolutions() -> nn.ModuleList:
    """The convolutions, ink [B, 1, 64, 64] to [B, 128, 4, 4], a ReLU after each."""
    layers = nn.ModuleList()
    inputs = 1
    for index, (outputs, stride) in enumerate(zip(CHANNELS, STRIDES, strict=True)):
        size = 3 if index else 5
        layers.append(nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2))
        inputs = outputs
    return layers

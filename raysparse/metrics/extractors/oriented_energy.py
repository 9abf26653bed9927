"""Oriented energy: how much ink runs in each direction, at three scales, in each part of the image. No weights.

A bank of Gabor pairs (8 directions) over a pyramid of the image (64, 32, 16 px); the modulus of each pair, a local
stroke energy that does not depend on the stroke's exact place, is averaged over a 4 x 4 grid: 3 x 8 x 16 = 384 values.
A FID over them compares stroke direction, length, density and layout of drawings. It is not the FID of any paper, and
not comparable with one: write it "FID (oriented_energy)".
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from raysparse.errors import UsageError
from raysparse.metrics.extractors._base import gray

NEEDS_WEIGHTS = False
DOWNLOADS = False

VERSION = "oriented-energy-1"  # change it with anything that changes a feature
SIZE_PX = 64
LEVELS = 3
DIRECTIONS = 8
GRID = 4
WAVELENGTH_PX = 6.0  # of the Gabors, on each level
SIGMA_PX = 2.0
KERNEL_PX = 11


class OrientedEnergy:
    """uint8 [B, 1 or 3, H, W] -> float32 [B, 384]; other sizes than 64 are resized (bilinear, antialiased)."""

    name = "oriented_energy"
    weights_hash = VERSION
    layer = f"grid{GRID}x{GRID}"
    feature_dim = LEVELS * DIRECTIONS * GRID * GRID
    resize = f"bilinear {SIZE_PX}"

    def __init__(self, device: str = "cpu") -> None:
        self.bank = _gabors().to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        level = 1 - gray(images.to(self.bank.device))  # ink is 1 on a ground of 0, so padding is empty paper
        if level.shape[-2:] != (SIZE_PX, SIZE_PX):
            level = F.interpolate(level, (SIZE_PX, SIZE_PX), mode="bilinear", antialias=True)
        features = []
        for _ in range(LEVELS):
            waves = F.conv2d(level, self.bank, padding=KERNEL_PX // 2)
            energy = (waves[:, 0::2].square() + waves[:, 1::2].square()).sqrt()
            features.append(F.adaptive_avg_pool2d(energy, GRID).flatten(1))
            level = F.avg_pool2d(level, 2)
        return torch.cat(features, dim=1)


def build(weights: Path | None = None, device: str = "cpu") -> OrientedEnergy:
    """The extractor on `device`. UsageError where weights are given: it has none."""
    if weights is not None:
        raise UsageError(f"oriented_energy has no weights, got {weights}; leave `weights` out")
    return OrientedEnergy(device)


def _gabors() -> torch.Tensor:
    """float32 [2 x directions, 1, k, k]: cosine and sine wave under a Gaussian, zero mean, unit norm."""
    axis = torch.arange(KERNEL_PX, dtype=torch.float64) - KERNEL_PX // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * SIGMA_PX**2))
    kernels = []
    for index in range(DIRECTIONS):
        angle = math.pi * index / DIRECTIONS
        phase = 2 * math.pi / WAVELENGTH_PX * (x * math.cos(angle) + y * math.sin(angle))
        for wave in (torch.cos(phase), torch.sin(phase)):
            kernel = window * (wave - (window * wave).sum() / window.sum())
            kernels.append(kernel / kernel.norm())
    return torch.stack(kernels).unsqueeze(1).float()

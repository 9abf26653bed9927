"""Inception v3 trained on QuickDraw (Ge et al. 2020, DoodlerGAN): behind the FIDs of ChiroDiff and the sparse papers.

torchvision's Inception v3 with a 1-channel first convolution and 345 classes; the 2048 features of the last average
pool. Input: 1 - image / 255, values below 0.1 set to 0, then bilinear to 299. The weights (`85.pt`) come from the
authors of that paper only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raysparse.errors import UsageError
from raysparse.files import sha256
from raysparse.metrics.extractors._base import gray, load_state, misfit

NEEDS_WEIGHTS = True
DOWNLOADS = False

CLASSES = 345
SIZE_PX = 299
FAINT = 0.1  # ink below it is taken for paper
WHAT = "a QuickDraw Inception v3 (1 channel, 345 classes)"


class SketchInception:
    """uint8 [B, 1 or 3, H, W] of any size -> float32 [B, 2048]; colours become gray."""

    name = "sketch_inception"
    layer = "2048"
    feature_dim = 2048
    resize = f"bilinear {SIZE_PX}"

    def __init__(self, weights: Path, device: str) -> None:
        self.network = network()
        state = _plain_names(load_state(weights, WHAT))
        self.weights_hash = sha256(weights)
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise misfit(weights, WHAT, error) from error
        self.network.fc = nn.Identity()
        self.network.requires_grad_(False).eval().to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        ink = 1 - gray(images.to(self.device))
        ink = torch.where(ink < FAINT, 0.0, ink)
        features: torch.Tensor = self.network(F.interpolate(ink, (SIZE_PX, SIZE_PX), mode="bilinear"))
        return features


def build(weights: Path | None = None, device: str = "cpu") -> SketchInception:
    """The extractor on `device`. UsageError without `weights`, or with a file that is not these weights."""
    if weights is None:
        raise UsageError(
            "sketch_inception needs `weights`: the QuickDraw Inception v3 of Ge et al. 2020 (DoodlerGAN), 85.pt, "
            "which only its authors hand out; give its path, or use an extractor that needs none"
        )
    return SketchInception(weights, device)


def network() -> nn.Module:
    """The architecture, with fresh weights that cost no time: they are loaded over."""
    from torchvision.models import Inception3
    from torchvision.models.inception import BasicConv2d

    model: nn.Module = Inception3(num_classes=CLASSES, aux_logits=True, transform_input=False, init_weights=False)
    model.Conv2d_1a_3x3 = BasicConv2d(1, 32, kernel_size=3, stride=2)
    return model


def _plain_names(state: dict[str, Any]) -> dict[str, Any]:
    """Of a training checkpoint the model's part, and of a DataParallel model the names without `module.`."""
    for wrapper in ("state_dict", "model", "net"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return {name.removeprefix("module."): value for name, value in state.items()}

"""torch-fidelity's Inception v3 (TensorFlow's weights of 2015-12-05): the FID that papers on images report.

Features are the 2048 of the last average pool. The resize to 299 is TensorFlow 1's bilinear, as torch-fidelity does it.
"""

from __future__ import annotations

import io
import shutil
import urllib.request
from pathlib import Path

import torch

from raysparse.errors import UsageError
from raysparse.files import atomic_path, sha256
from raysparse.metrics.extractors._base import load_state, misfit, rgb

NEEDS_WEIGHTS = False
DOWNLOADS = True

FILE = "weights-inception-2015-12-05-6726825d.pth"  # 95.7 MB
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHAT = "torch-fidelity's Inception v3 weights"


class Inception:
    """uint8 [B, 1 or 3, H, W] of any size -> float32 [B, 2048]; gray is repeated to three channels."""

    name = "inception"
    layer = "2048"
    feature_dim = 2048
    resize = "bilinear (TensorFlow 1) 299"

    def __init__(self, weights: Path, device: str) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        plain = io.BytesIO()
        torch.save(load_state(weights, WHAT), plain)
        plain.seek(0)  # torch-fidelity unpickles whatever it is given, so it gets our own copy of the plain tensors
        self.weights_hash = sha256(weights)
        try:
            network = FeatureExtractorInceptionV3(self.name, [self.layer], feature_extractor_weights_path=plain)
        except RuntimeError as error:
            raise misfit(weights, WHAT, error) from error
        self.network = network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(rgb(images.to(self.device)))[0]
        return features


def build(weights: Path | None = None, device: str = "cpu") -> Inception:
    """The extractor on `device`, from `weights` or from torch's hub folder, downloaded there the first time.

    UsageError where the file is absent, damaged or not these weights, or the download fails.
    """
    path = weights or _downloaded(Path(torch.hub.get_dir()) / "checkpoints" / FILE)
    if path.is_file() and path.name == FILE:
        _check(path)
    return Inception(path, device)


def _downloaded(path: Path) -> Path:
    """`path`, fetched first if it is not there; the same place as torch-fidelity's own, so it is fetched once."""
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(URL, timeout=60) as response, atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                shutil.copyfileobj(response, file)
            _check(temporary)
    except OSError as error:  # URLError is one
        raise UsageError(
            f"{WHAT} are not at {path} and could not be downloaded ({error}); "
            f"get {URL} elsewhere and give its path as `weights`, or use an extractor that needs none"
        ) from error
    return path


def _check(path: Path) -> None:
    found = sha256(path)
    if found != SHA256:
        raise UsageError(f"{path} is damaged: sha256 {found[:8]}..., expected {SHA256[:8]}...; delete it, get {URL}")

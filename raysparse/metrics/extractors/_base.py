"""What an extractor is, and the input checks that they share.

An extractor file has `build(weights: Path | None = None, device="cpu") -> Extractor`, NEEDS_WEIGHTS (without
`weights` it raises UsageError) and DOWNLOADS (without `weights` it fetches them, once).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from raysparse.errors import UsageError


class Extractor(Protocol):
    """Images to features: __call__(uint8 [B, C, H, W], C 1 or 3) -> float32 [B, feature_dim] on `device`, no grad."""

    name: str  # of its file
    weights_hash: str  # of what decides the features: the weights' bytes, or the recipe's version
    layer: str  # which features
    feature_dim: int
    resize: str  # how drawn pixels become the network's input

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


def extract(extractor: Extractor, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Features of all images: float32 [N, feature_dim] on the CPU. batches: uint8 [B, C, H, W] each, B >= 1."""
    features = [exactly(extractor, images).cpu() for images in batches]
    if not features:
        raise UsageError("no images to extract features from; generate or load at least one")
    return torch.cat(features)


def exactly(extractor: Extractor, images: torch.Tensor) -> torch.Tensor:
    """Features in full float32: a GPU's convolutions round to TF32 unless told not to, and the references may be a
    CPU's. The settings that training goes by are as they were afterwards.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        return extractor(images)
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def checked(images: torch.Tensor) -> torch.Tensor:
    """`images` if they are uint8 [B, 1 or 3, H, W], else UsageError."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(f"an extractor takes uint8 images [B, 1 or 3, H, W], got {images.dtype} {[*images.shape]}")
    return images


def gray(images: torch.Tensor) -> torch.Tensor:
    """float32 [B, 1, H, W] in [0, 1]; colours by ITU-R 601 luma, so a gray image's three channels give its one back."""
    x = checked(images).float() / 255
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def rgb(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W]; gray is repeated."""
    return checked(images).expand(-1, 3, -1, -1)


def load_state(path: Path, what: str) -> dict[str, Any]:
    """A state dict from a .safetensors or a torch file, never unpickling code. UsageError where that fails."""
    import pickle

    if not path.is_file():
        raise UsageError(f"no file {path} ({what}); give the path of the weights")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path} does not hold {what} as plain tensors ({reason}); get the file again") from error
    except Exception as error:  # safetensors' own class, known only where safetensors is imported
        raise UsageError(f"{path} does not hold {what} ({error}); get the file again") from error
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds a {type(state).__name__}, not a state dict with {what}; get the right file")
    return state


def misfit(path: Path, what: str, error: RuntimeError) -> UsageError:
    """load_state_dict's complaint, its first lines, as the user's error."""
    lines = [line.strip() for line in str(error).splitlines()[1:3]]
    return UsageError(f"{path} does not hold {what}: {' '.join(lines)[:300]}; get the right file")

"""A folder of 100 small pictures and what prepares it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from toy_encoder import ToyEncoder

from raysparse.data import prepared

SIDE = 16
OPTIONS: dict[str, Any] = {"size_px": SIDE, "flips": True, "validation_examples": 10}


def prepare(source: Path, root: Path, **changes: Any) -> Path:
    encoder, run = changes.pop("encoder", ToyEncoder()), changes.pop("run", prepared.in_order)
    return prepared.prepare("imagefolder", OPTIONS | changes, source, root, encoder=encoder, run=run)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def pixels_of(source: Path, names: Sequence[str]) -> torch.Tensor:
    stack = np.stack([np.asarray(Image.open(source / name)).transpose(2, 0, 1) for name in names])
    return torch.from_numpy(stack)

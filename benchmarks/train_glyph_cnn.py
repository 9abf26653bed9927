"""Train raysparse/metrics/extractors/glyph_cnn.safetensors: tell the distinct glyphs of the Hershey fonts apart.

    python benchmarks/train_glyph_cnn.py --out glyph_cnn.safetensors        # about 10 minutes on one core

Each glyph is drawn COPIES times under random affine maps (rotation, scale, shear, small warps), one class per distinct
glyph. Nothing but those fonts goes in, so KanjiVG and QuickDraw are unseen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from HersheyFonts import HersheyFonts
from torch import nn

from raysparse import rng
from raysparse.data import drawing
from raysparse.files import atomic_path
from raysparse.metrics.extractors import glyph_cnn
from raysparse.metrics.extractors._base import extract

COPIES = 32
BATCH = 128
STEPS = 1500
LEARNING_RATE = 4e-3


def glyphs() -> list[list[np.ndarray]]:
    """Every distinct glyph: strokes of at least two points, float64 [n, 2]."""
    font, found = HersheyFonts(), {}
    for name in font.default_font_names:
        font.load_default_font(name)
        for glyph in font.all_glyphs.values():
            strokes = [np.array(stroke, np.float64) for stroke in glyph.strokes if len(stroke) > 1]
            if strokes:
                found.setdefault(json.dumps([stroke.tolist() for stroke in strokes]), strokes)
    return list(found.values())


def varied(strokes: list[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    """One copy under a random affine map and a smooth warp: float32 [n, 3] x, y, pen."""
    whole = np.concatenate(strokes)
    size = max(np.ptp(whole, axis=0).max(), 1e-6)
    angle, shear = draw.normal(0, 0.12), draw.normal(0, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag(np.exp(draw.normal(0, 0.12, 2))) @ np.array([[1, shear], [0, 1]])
    waves, phase, depth = draw.normal(0, 3, (2, 2)), draw.uniform(0, 2 * np.pi, 2), draw.normal(0, 0.02, 2)
    parts = []
    for stroke in strokes:
        unit = (stroke - whole.mean(axis=0)) / size
        points = 10 * (unit @ matrix.T + depth * np.sin(unit @ waves + phase))
        parts.append(np.c_[points, np.zeros(len(points))])
        parts[-1][-1, 2] = 1
    return np.concatenate(parts).astype(np.float32)


def images_of(shapes: list[list[np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [COPIES * n, 1, 64, 64] and their classes."""
    draw = rng.numpy_generator(0, "glyph copies")
    copies = [varied(strokes, draw) for _ in range(COPIES) for strokes in shapes]
    images = drawing.draw(np.concatenate(copies), np.array([len(copy) for copy in copies]), radius=10.0)
    return torch.from_numpy(images[:, None]), torch.arange(len(shapes)).repeat(COPIES)


class Classifier(nn.Module):
    """glyph_cnn's convolutions, each followed by batch norm and ReLU, then one linear layer on the last means."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.convolutions = glyph_cnn.convolutions()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in glyph_cnn.CHANNELS)
        self.head = nn.Linear(glyph_cnn.CHANNELS[-1], classes)

    def forward(self, ink: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            ink = F.relu(norm(convolution(ink)))
        return self.head(ink.mean(dim=(2, 3)))

    def folded(self) -> dict[str, torch.Tensor]:
        """State of `convolutions()` alone, float16, computing the same in evaluation."""
        state = {}
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            state[f"{index}.weight"] = (convolution.weight * scale[:, None, None, None]).detach().half()
            state[f"{index}.bias"] = ((convolution.bias - norm.running_mean) * scale + norm.bias).detach().half()
        return state


def scale_of(features: torch.Tensor) -> torch.Tensor:
    """float32 [D]: one over each feature's spread, floored so that a nearly dead one is not blown up."""
    spread = features.std(dim=0)
    return 1 / (spread + 0.05 * spread.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=glyph_cnn.WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fixed order of sums: the same file again
    shapes = glyphs()
    images, classes = images_of(shapes)
    torch.manual_seed(rng.key(0, "glyph_cnn weights"))
    model = Classifier(len(shapes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=options.steps)
    start, right = time.perf_counter(), 0.0
    for step in range(options.steps):
        chosen = torch.randint(len(images), (BATCH,), generator=rng.generator(0, "glyph batch", step=step))
        scores = model(1 - images[chosen].float() / 255)
        loss = F.cross_entropy(scores, classes[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right = 0.98 * right + 0.02 * float((scores.argmax(dim=1) == classes[chosen]).float().mean())
        if step % 100 == 99:
            print(
                f"step {step + 1} loss {loss:.3f} accuracy {right:.3f} {time.perf_counter() - start:.0f} s", flush=True
            )
    state = model.folded()
    state[glyph_cnn.SCALE] = torch.ones(glyph_cnn.GlyphCNN.feature_dim)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.safetensors"
        safetensors.torch.save_file(state, draft)
        features = extract(glyph_cnn.build(draft), images[: 3 * len(shapes)].split(BATCH))
    state[glyph_cnn.SCALE] = scale_of(features)
    with atomic_path(options.out) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={"recipe": "benchmarks/train_glyph_cnn.py"})


if __name__ == "__main__":
    main()

"""Do the offline extractors rank models as they should? real < well trained < half trained < untrained < noise.

    python benchmarks/extractor_ranking.py --quick                      # hershey only, a few minutes
    python benchmarks/extractor_ranking.py --kanjivg kanji.rdp100.npz   # both data sets, a quarter of an hour each

Trains small ChiroDiffs (h = 48, 2 layers, PAPER: measured recipe), draws samples at each stage and prints, for every
extractor that needs no download, FID as mean +- standard deviation over training and sampling seeds, and the verdict:
is the order right for every single value, and how wide is the narrowest gap beside the spread of its two levels.
`noise` is uniformly random pixels; `scribble` (shown, not in the verdict) is Gaussian points joined by lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.stats
import torch

from raysparse import plugins, rng
from raysparse.data import prepared
from raysparse.data.loader import batch_indices
from raysparse.data.sketch import Examples
from raysparse.diffusion.ddim import sample
from raysparse.diffusion.losses import eps_mse
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.metrics.extractors._base import extract
from raysparse.metrics.fidelity import fid, statistics
from raysparse.models import chirodiff

LEVELS = ("real", "well trained", "half trained", "untrained", "noise")
BATCH = 128
DDIM_STEPS = 50
CHUNK = 250  # samples of similar length drawn at once


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is trained and drawn."""

    well_steps: int = 1200
    half_steps: int = 300
    samples: int = 1000
    reference: int = 4000
    training_seeds: int = 2
    sampling_seeds: int = 3


QUICK = Budget(well_steps=500, half_steps=120, samples=500, reference=1500, training_seeds=1, sampling_seeds=2)


def stages(train: Examples, seed: int, marks: list[int]) -> Iterator[tuple[int, torch.nn.Module]]:
    """(step, model with averaged weights) at each of the ascending marks."""
    config = chirodiff.Config(hidden=48, layers=2)
    model, average = chirodiff.build(config, seed), chirodiff.build(config, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = NoiseSchedule()
    for step in range(marks[-1] + 1):
        if step in marks:
            yield step, average
        batch = train.batch(batch_indices(len(train), BATCH, seed, step))
        draw = rng.generator(seed, "ranking step", step=step)
        timesteps = torch.randint(schedule.timesteps, (BATCH,), generator=draw)
        eps = torch.randn(batch["x"].shape, generator=draw)
        prediction = model(schedule.add_noise(batch["x"], eps, timesteps), timesteps, **batch["cond"])
        optimizer.zero_grad()
        eps_mse(prediction, eps, batch["cond"]["lengths"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for shadow, weight in zip(average.parameters(), model.parameters(), strict=True):
                shadow.lerp_(weight, 1 - min(0.9999, (1 + step) / (10 + step)))


def generated(model: torch.nn.Module, like: Examples, count: int, seed: int) -> torch.Tensor:
    """`count` samples drawn as images: uint8 [count, 1, 64, 64]."""
    shape, cond = like.draw_conditions(count, rng.numpy_generator(seed, "ranking lengths"))
    noise = torch.randn(shape, generator=rng.generator(seed, "ranking noise"))
    images = []
    for rows in torch.argsort(cond["lengths"]).split(CHUNK):
        some = {name: value[rows] for name, value in cond.items()}
        longest = int(some["lengths"].max())
        x = sample(model, NoiseSchedule(), noise[rows, :longest], steps=DDIM_STEPS, cond=some)
        images.append(like.to_images(x, some))
    return torch.cat(images)


def noise(like: Examples, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pixels, and Gaussian sequences of real lengths drawn as sketches: uint8 [count, 1, 64, 64] each."""
    draw = rng.generator(seed, "ranking pixels")
    pixels = torch.randint(256, (count, 1, 64, 64), generator=draw, dtype=torch.uint8)
    shape, cond = like.draw_conditions(count, rng.numpy_generator(seed, "ranking lengths"))
    return pixels, like.to_images(torch.randn(shape, generator=draw), cond)


def levels(folder: Path, budget: Budget) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """The reference images, and for each level the image sets of all seeds."""
    train, held_out, reference = (prepared.open_split(folder, split) for split in ("train", "validation", "reference"))
    sets: dict[str, list[torch.Tensor]] = {level: [] for level in (*LEVELS, "scribble")}
    of_step = {0: "untrained", budget.half_steps: "half trained", budget.well_steps: "well trained"}
    for training_seed in range(budget.training_seeds):
        for step, model in stages(train, training_seed, sorted(of_step)):
            for seed in range(budget.sampling_seeds):
                sets[of_step[step]].append(generated(model, train, budget.samples, 100 * training_seed + seed))
    for seed in range(budget.sampling_seeds):
        order = rng.numpy_generator(seed, "ranking held out").permutation(len(held_out))
        sets["real"].append(held_out.images(order[: budget.samples]))
        for level, images in zip(("noise", "scribble"), noise(train, budget.samples, seed), strict=True):
            sets[level].append(images)
    order = rng.numpy_generator(0, "ranking reference").permutation(len(reference))
    return reference.images(order[: budget.reference]), sets


def verdict(fids: dict[str, list[float]]) -> str:
    """Order over every single value, Spearman's rank correlation, and the narrowest gap in units of the spread."""
    ordered = all(max(fids[low]) < min(fids[high]) for low, high in itertools.pairwise(LEVELS))
    ranks = [rank for rank, level in enumerate(LEVELS) for _ in fids[level]]
    spearman = scipy.stats.spearmanr(ranks, [value for level in LEVELS for value in fids[level]]).statistic
    gaps = {
        f"{low} / {high}": (np.mean(fids[high]) - np.mean(fids[low]))
        / max(np.sqrt((np.var(fids[low]) + np.var(fids[high])) / 2), 1e-12)
        for low, high in itertools.pairwise(LEVELS)
    }
    narrowest = min(gaps, key=gaps.__getitem__)
    return f"{'right' if ordered else 'WRONG'} | {spearman:.3f} | {gaps[narrowest]:.0f} ({narrowest})"


def rank(title: str, folder: Path, budget: Budget) -> None:
    """Print one data set's table."""
    start = time.perf_counter()
    reference, sets = levels(folder, budget)
    print(f"\n{title}: {budget}, {time.perf_counter() - start:.0f} s to train and draw\n")
    shown = (*LEVELS, "scribble")
    print(f"| extractor | D | images/s | {' | '.join(shown)} | order | Spearman | narrowest gap / spread |")
    print("|---" * (len(shown) + 6) + "|")
    for name in plugins.names("extractors"):
        module = plugins.load("extractors", name)
        if module.NEEDS_WEIGHTS or module.DOWNLOADS:
            continue
        extractor = module.build()
        start = time.process_time()
        real = statistics(extract(extractor, reference.split(CHUNK)))
        speed = len(reference) / (time.process_time() - start)
        fids = {
            level: [fid(real, statistics(extract(extractor, images.split(CHUNK)))) for images in sets[level]]
            for level in shown
        }
        cells = " | ".join(f"{np.mean(fids[level]):.4g} ± {np.std(fids[level]):.2g}" for level in shown)
        print(f"| {name} | {extractor.feature_dim} | {speed:.0f} | {cells} | {verdict(fids)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kanjivg", type=Path, help="path of kanji.rdp100.npz: rank on it too")
    parser.add_argument("--only-kanjivg", action="store_true", help="leave hershey out")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    options = parser.parse_args()
    budget = QUICK if options.quick else Budget()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        recipe = {"representation": "del", "spacing": 0.1}
        if not options.only_kanjivg:
            rank("hershey", prepared.prepare("hershey", recipe, root=root), budget)
        if options.kanjivg:
            rank("kanjivg", prepared.prepare("kanjivg", recipe, options.kanjivg, root), budget)


if __name__ == "__main__":
    main()

"""How well do fewer samples and DDIM steps rank trials? What `evaluate.intermediate` may be is decided by this.

    python benchmarks/intermediate_fid.py --kanjivg kanji.rdp100.npz    # one thread, about a quarter of an hour
    python benchmarks/intermediate_fid.py --pictures --full 2000        # Latent Diffusion's U-Net on glyphs in colour

Trains the trials of a small study (dense, static, MagRan and RigL at several S, one seed each), and takes FIDs of the
same weights at the middle and at the end under every protocol: samples x DDIM steps. `at the end`: Spearman's rank
correlation of that FID with the FID of --full samples x 50 steps, both of the last weights. `from the middle`: of the
FID in the middle of training with that same final FID, which is what early stopping asks of it. `noise` is the
standard deviation between two sampling seeds over that between the trials, medians over both places.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from raysparse import config
from raysparse.config import TrialConfig
from raysparse.metrics import fidelity
from raysparse.train import setup

SAMPLES = (250, 500, 1000)
DDIM_STEPS = (5, 10, 20, 50)
SEEDS = (0, 1)  # of sampling
BATCH = 250  # divides all of SAMPLES: the first n of many samples are then those of a protocol of n
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "dense"},
    *({"method": "static", "sparsity": sparsity} for sparsity in (0.5, 0.75, 0.9)),
    *({"method": "rigl", "sparsity": sparsity, "prune_ratio": 0.1} for sparsity in (0.5, 0.9)),
    *({"method": "magran", "sparsity": sparsity, "prune_ratio": 0.1} for sparsity in (0.5, 0.9)),
)


def trial(options: argparse.Namespace, sparse: dict[str, Any], **evaluate: Any) -> TrialConfig:
    """One of the study."""
    interval = {"update_interval": options.steps // 10} if "prune_ratio" in sparse else {}
    content = pictures(options) if options.pictures else sketches(options)
    content["sparse"] = sparse | interval
    content["train"] = {"steps": options.steps, "runtime": "auto"} | content.get("train", {})
    content["evaluate"] = content.get("evaluate", {}) | {
        "every_steps": options.steps // 2, "generated": 4, "ddim_steps": 1, "kid_subsets": 1, "kid_subset_size": 2,
        "batch_size": BATCH, "runtime": "auto",
    } | evaluate  # fmt: skip
    return config.parse(content)


def sketches(options: argparse.Namespace) -> dict[str, Any]:
    """As in tune_spaces/kanjivg_small.yaml."""
    recipe = {"representation": "del", "spacing": 0.1}
    return {
        "data": {"name": "kanjivg" if options.kanjivg else "hershey", "root": options.root, "options": recipe}
        | ({"source": str(options.kanjivg)} if options.kanjivg else {}),
        "model": {"options": {"hidden": options.hidden, "layers": options.layers}},
        "optimizer": {"lr": 4e-3, "warmup_steps": 50},
    }


def pictures(options: argparse.Namespace) -> dict[str, Any]:
    """As in tune_spaces/glyph_pictures.yaml, at 16 x 16 and 177,427 parameters."""
    network = {
        "sample_size": 16, "block_out_channels": [16, 32], "attention_levels": [False, True], "layers_per_block": 1,
        "attention_head_dim": 16, "norm_num_groups": 8,
    }  # fmt: skip
    return {
        "data": {"name": "hershey_pictures", "root": options.root, "options": {"size_px": 16}},
        "model": {"name": "latent_unet", "options": network},
        "diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "optimizer": {"lr": 2e-3, "warmup_steps": 20, "clip_norm": 1.0},
        "train": {"batch_size": 16},
        "evaluate": {"extractor": "oriented_energy", "timestep_spacing": "trailing"},
    }


def stages(of: TrialConfig) -> list[torch.nn.Module]:
    """The averaged weights in the middle and at the end."""
    trainer = setup.build(of)
    return [copy.deepcopy(trainer.ema.evaluation_model()) for _ in trainer.run()]


def fids(options: argparse.Namespace, sparse: dict[str, Any], model: torch.nn.Module, last: bool) -> dict[Any, float]:
    """(samples, steps, seed) -> FID; the full protocol too where it is the last."""
    found: dict[Any, float] = {}
    for steps in DDIM_STEPS:
        for seed in SEEDS:
            full = last and steps == DDIM_STEPS[-1] and seed == SEEDS[0]
            count = options.full if full else SAMPLES[-1]
            of = trial(options, sparse, generated=count, ddim_steps=steps)
            judge = setup.evaluator(of.model_copy(update={"seed": seed}))
            sampled = judge.sample_features(model, judge.sampler)
            assert sampled is not None
            features = sampled[0].numpy()
            for samples in (*SAMPLES, *([options.full] if full else [])):
                made = fidelity.statistics(features[:samples])
                found[samples, steps, seed] = fidelity.fid(made, judge.reference.statistics)
    return found


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    return float(scipy.stats.spearmanr(one, other).statistic)


def table(options: argparse.Namespace, measured: list[tuple[dict[Any, float], dict[Any, float]]]) -> list[list[str]]:
    """A row per protocol. measured: FIDs in the middle and at the end, of each trial."""
    final = [end[options.full, DDIM_STEPS[-1], SEEDS[0]] for _, end in measured]
    rows = []
    for samples in SAMPLES:
        for steps in DDIM_STEPS:
            of_seed = [[[at[samples, steps, seed] for at in both] for both in measured] for seed in SEEDS]
            noise = []
            for place in (0, 1):
                values = np.array([[both[place] for both in seed] for seed in of_seed])
                between = float(values.mean(0).std(ddof=1))
                noise.append(math.sqrt(float(values.var(0, ddof=1).mean())) / between)
            rhos = [[correlation([both[place] for both in seed], final) for seed in of_seed] for place in (1, 0)]
            calls = samples * steps / (options.full * DDIM_STEPS[-1])
            best = [int(np.argmin([both[1] for both in seed])) == int(np.argmin(final)) for seed in of_seed]
            rows.append([
                f"{samples} x {steps}", f"{calls:.4f}",
                *(" and ".join(f"{rho:.2f}" for rho in pair) for pair in rhos),
                f"{statistics.median(noise):.3f}", f"{sum(best)} of {len(best)}",
            ])  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kanjivg", type=Path, help="kanji.rdp100.npz; without it: the embedded glyphs")
    parser.add_argument("--pictures", action="store_true", help="pictures and a U-Net")
    parser.add_argument("--hidden", type=int, default=32, help="h (default 32)")
    parser.add_argument("--layers", type=int, default=1, help="layers of the GRU (default 1)")
    parser.add_argument("--steps", type=int, default=1000, help="of each trial (default 1000)")
    parser.add_argument("--full", type=int, default=4000, help="samples of the full protocol (default 4000)")
    options = parser.parse_args(arguments)
    start, measured = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as root:
        options.root = root
        for sparse in METHODS:
            of = trial(options, sparse)
            setup.prepare_data(of)
            middle, end = stages(of)
            measured.append((fids(options, sparse, middle, False), fids(options, sparse, end, True)))
            final = measured[-1][1][options.full, DDIM_STEPS[-1], SEEDS[0]]
            print(f"{sparse}: FID {final:.1f}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(
        f"{len(METHODS)} trials of {options.steps} steps; the full protocol is {options.full} x {DDIM_STEPS[-1]}; two "
        f"values are two sampling seeds\n\n| samples x steps | network calls, of full | rank correlation at the end "
        "| from the middle | noise | best at the end is best in full |\n|---|---|---|---|---|---|"
    )
    for row in table(options, measured):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()

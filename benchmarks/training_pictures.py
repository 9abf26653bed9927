"""A training step of U-ViT with sparse weights: what computing with the active ones only saves, beside the dense step.

A step is noise prediction, loss, backward, masked gradients and AdamW at CIFAR-10's sizes, with ERK masks. The runtimes
take turns on the same batches in one process; a ratio is of two steps of the same turn, and the first turn, which warms
up, is left out. There the gradients of the active weights are compared with the dense ones.

    python benchmarks/training_pictures.py                             # width 512, 12 blocks, 4 pictures: 6 minutes
    python benchmarks/training_pictures.py --width 256 --pattern element --sparsity .9

Runtimes: `dense` is PyTorch without masks, `masked` the same with a SparseEngine, `sparse` `train.runtime: sparse`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysparse import rng
from raysparse.models import uvit
from raysparse.sparse import SparseEngine


class Runner:
    """One model with its optimizer and its masks, and how it steps."""

    def __init__(self, config: uvit.Config, kind: str, sparsity: float, pattern: str) -> None:
        self.model = uvit.build(config, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.network: nn.Module = self.model
        self.engine: SparseEngine | None = None
        if kind != "dense":
            settings = {"sparsity": sparsity, "allocation": "erk", "pattern": pattern}
            self.engine = SparseEngine(self.model, self.optimizer, method="static", **settings)
        if kind == "sparse":
            assert self.engine is not None
            self.network = uvit.sparse_step(self.model, self.engine.masks)

    def gradients(self, x: Tensor, timesteps: Tensor, eps: Tensor) -> None:
        self.optimizer.zero_grad()
        (self.network(x, timesteps) - eps).square().mean().backward()
        if self.engine is not None:
            self.engine.mask_gradients()

    def step(self, *batch: Tensor) -> None:
        self.gradients(*batch)
        self.optimizer.step()
        if self.engine is not None:
            self.engine.after_step()


def batch_of(turn: int, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = rng.generator(0, "training benchmark of pictures", step=turn)
    x, eps = (torch.randn(count, 3, size, size, generator=draw) for _ in range(2))
    return x, torch.randint(0, 1000, (count,), generator=draw), eps


def difference(model: nn.Module, reference: nn.Module) -> float:
    """Largest relative difference of the gradient of a parameter."""
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs if a is not None and b is not None)


def measure(options: argparse.Namespace, sparsity: float, pattern: str) -> None:
    """Print the rows of one sparsity and pattern."""
    config = uvit.Config(sample_size=options.size, embed_dim=options.width, depth=options.depth, num_heads=8)
    runners = {kind: Runner(config, kind, sparsity, pattern) for kind in ("dense", "masked", "sparse")}
    for kind in ("masked", "sparse"):
        runners[kind].gradients(*batch_of(0, options.pictures, options.size))
    off = difference(runners["sparse"].model, runners["masked"].model)
    seconds: dict[str, list[float]] = {kind: [] for kind in runners}
    for turn in range(options.turns + 1):
        batch = batch_of(turn, options.pictures, options.size)
        for kind, runner in runners.items():
            begun = time.perf_counter()
            runner.step(*batch)
            if turn:
                seconds[kind].append(time.perf_counter() - begun)
    for kind, times in seconds.items():
        ratios = [dense / mine for dense, mine in zip(seconds["dense"], times, strict=True)]
        row = [f"uvit {options.width} x {options.depth}", f"{sparsity:g}", pattern, kind]
        row.append(f"{statistics.median(times) * 1e3:.0f}")
        row.append(f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
        print(f"| {' | '.join([*row, f'{off:.0e}' if kind == 'sparse' else '–'])} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of a token (default 512)")
    parser.add_argument("--depth", type=int, default=12, help="blocks beside the middle one (default 12)")
    parser.add_argument("--size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--pattern", nargs="+", default=["element", "block", "diagonal"])
    parser.add_argument("--pictures", type=int, default=4, help="per step (default 4)")
    parser.add_argument("--turns", type=int, default=3, help="measured turns (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="one small model: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.depth, options.size, options.turns, options.pictures = 128, 2, 16, 1, 8
        options.sparsity, options.pattern = [0.9], ["element", "diagonal"]
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s), "
        f"{options.pictures} pictures\n\n"
        "| model | S | pattern | runtime | ms a step | times faster than dense | gradients differ by |\n"
        "|---|---|---|---|---|---|---|"
    )
    for pattern in options.pattern:
        for sparsity in options.sparsity:
            measure(options, sparsity, pattern)


if __name__ == "__main__":
    main()

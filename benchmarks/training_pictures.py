"""A training step on pictures with sparse weights: what computing with the active ones only saves.

A step of U-ViT or of DDPM's U-Net is noise prediction, loss, backward, masked gradients and AdamW at CIFAR-10's sizes,
with ERK masks. The runtimes take turns on the same batches in one process; a ratio is of two steps of the same turn.
Before them the gradients of the active weights are compared with the dense ones. Peak memory is what a runtime's model,
optimizer and masks and its first step take. Widths 512 and 128 are the published networks (44.3M and 35.7M parameters).

    python benchmarks/training_pictures.py                             # 4 pictures, one thread: 8 minutes
    python benchmarks/training_pictures.py --model uvit --width 256 --pattern element --sparsity .9

Runtimes: `dense` is PyTorch without masks, `masked` the same with a SparseEngine, `sparse` `train.runtime: sparse`.
`--updates` adds a topology update of RigL-DM with its new masks laid out for the kernels, without the step before it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other file; a script has only its own folder

from benchmarks.peak_memory import made
from raysparse import plugins, rng
from raysparse.sparse import SparseEngine


def options_of(name: str, width: int | None, size: int, quick: bool) -> dict[str, Any]:
    """The published network's settings, or of another width."""
    if name == "uvit":
        return {"sample_size": size, "embed_dim": width or 512, "depth": 2 if quick else 12, "num_heads": 8}
    width = width or 128
    found: dict[str, Any] = {"sample_size": size, "block_out_channels": (width, 2 * width, 2 * width, 2 * width)}
    return found | ({"layers_per_block": 1} if quick else {})


IN_FP32 = ", fp32"  # ends the name of a kind
UPDATE = "update (rigl)"


class Runner:
    """One model with its optimizer and its masks, and how it steps."""

    def __init__(
        self, name: str, settings: dict[str, Any], kind: str, sparsity: float, pattern: str, *, bf16: bool = False
    ) -> None:
        module, self.half = plugins.load("models", name), torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        self.model: nn.Module = module.build(module.Config(**settings), seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.network: nn.Module = self.model
        self.engine: SparseEngine | None = None
        self.updates = kind == UPDATE
        if kind != "dense":
            method = (
                {"method": "rigl", "update_interval": 1, "prune_ratio": 0.3} if self.updates else {"method": "static"}
            )
            masked = {**method, "sparsity": sparsity, "allocation": "erk", "pattern": pattern}
            self.engine = SparseEngine(self.model, self.optimizer, **masked)
        if self.updates or kind == "sparse":
            assert self.engine is not None
            with self.half:  # kernels compete with dense products in its type
                step = module.sparse_step(self.model, self.engine.masks)
            self.network, self.follow = step, step.follow

    def gradients(self, x: Tensor, timesteps: Tensor, eps: Tensor) -> None:
        self.optimizer.zero_grad()
        with self.half:
            loss = (self.network(x, timesteps) - eps).square().mean()
        loss.backward()
        if self.engine is not None:
            self.engine.mask_gradients()

    def before(self, *batch: Tensor) -> None:
        """What a turn does not time: the step that an update grows by, with the gradients of all weights."""
        if self.updates:
            sparse, self.network = self.network, self.model
            self.gradients(*batch)
            self.network = sparse
            self.optimizer.step()

    def step(self, *batch: Tensor) -> None:
        if not self.updates:
            self.gradients(*batch)
            self.optimizer.step()
        if self.engine is not None:
            self.engine.after_step()
            if self.updates:
                self.follow(self.engine.masks)


def batch_of(turn: int, count: int, size: int, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    draw = rng.generator(0, "training benchmark of pictures", step=turn)
    x, eps = (torch.randn(count, channels, size, size, generator=draw) for _ in range(2))
    return x, torch.randint(0, 1000, (count,), generator=draw), eps


def difference(both: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of all gradients together from what they are to be, relative: those of a key's bias alone are rounding."""
    off, whole = (
        sum(float(part.double().square().sum()) for part in parts)
        for parts in zip(*((a - b, b) for a, b in both), strict=True)
    )
    return (off / whole) ** 0.5


def gradients_of(runner: Runner, options: argparse.Namespace) -> list[Tensor]:
    """Of the first batch."""
    runner.gradients(*batch_of(0, options.pictures, options.size))
    return [weight.grad for weight in runner.model.parameters() if weight.grad is not None]


def measure(options: argparse.Namespace, name: str, sparsity: float, pattern: str) -> None:
    """Print the rows of one model, sparsity and pattern."""
    settings = options_of(name, options.width, options.size, options.quick)

    def runner_of(kind: str) -> Runner:
        plain = kind.removesuffix(IN_FP32)
        return Runner(name, settings, plain, sparsity, pattern, bf16=options.bf16 and plain == kind)

    kinds = ["dense", "masked", "sparse", *[UPDATE] * options.updates, *["dense" + IN_FP32] * options.bf16]
    off = difference(list(zip(*(gradients_of(runner_of(kind), options) for kind in ("sparse", "masked")), strict=True)))
    makers = {kind: partial(runner_of, kind) for kind in kinds}

    def turn_of(runner: Runner, batch: Sequence[Tensor]) -> float:
        """Its seconds."""
        runner.before(*batch)
        begun = time.perf_counter()
        runner.step(*batch)
        return time.perf_counter() - begun

    runners, memory = made(makers, lambda runner: turn_of(runner, batch_of(0, options.pictures, options.size)))
    seconds: dict[str, list[float]] = {kind: [] for kind in runners}
    for turn in range(1, options.turns + 1):
        batch = batch_of(turn, options.pictures, options.size)
        for kind, runner in runners.items():
            seconds[kind].append(turn_of(runner, batch))
    engine = runners["masked"].engine
    assert engine is not None
    left = sum(int(mask.sum()) for mask in engine.masks.values()) / sum(mask.numel() for mask in engine.masks.values())
    for kind, times in seconds.items():
        ratios = [dense / mine for dense, mine in zip(seconds["dense"], times, strict=True)]
        row = [name, f"{sparsity:g}", pattern, kind]
        row.append(f"{statistics.median(times) * 1e3:.0f}")
        row.append(f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
        row += [f"{left if kind == 'sparse' else 1:.3f}", memory[kind], f"{off:.0e}" if kind == "sparse" else "–"]
        print(f"| {' | '.join(row)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["uvit", "ddpm_unet"])
    parser.add_argument("--width", type=int, help="of a token, or of the first channels (default: as published)")
    parser.add_argument("--size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--pattern", nargs="+", default=["element", "diagonal"])
    parser.add_argument("--pictures", type=int, default=4, help="per step (default 4)")
    parser.add_argument("--turns", type=int, default=3, help="measured turns (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--bf16", action="store_true", help="under autocast, as `train.precision: bf16`; else float32")
    parser.add_argument("--updates", action="store_true", help="topology updates too")
    parser.add_argument("--quick", action="store_true", help="one small model: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.size, options.turns, options.pictures = 64, 16, 1, 8
        options.sparsity, options.pattern = [0.9], ["element", "diagonal"]
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s), "
        f"{'bf16' if options.bf16 else 'fp32'}, {options.pictures} pictures\n\n"
        "| model | S | pattern | runtime | ms a step | times faster than dense | weights computed | peak MiB "
        "| gradients differ by |\n" + "|---" * 9 + "|"
    )
    for name in options.model:
        for pattern in options.pattern:
            for sparsity in options.sparsity:
                measure(options, name, sparsity, pattern)


if __name__ == "__main__":
    main()

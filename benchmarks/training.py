"""A training step with sparse weights: what computing with the active ones only saves, beside the dense step.

A step of ChiroDiff is noise prediction, loss, backward, masked gradients, clipping and AdamW on a batch as long as
KanjiVG's sketches (mean 88.6 points, at most 165), with ER masks. The runtimes take turns on the same batches in one
process; a ratio is of two steps of the same turn. Before them the gradients of the active weights are compared with the
dense ones. Peak memory is what a runtime's model, optimizer and masks and its first step, on the longest batch, take.

    python benchmarks/training.py                # h = 96, 3 layers, batch 128, one thread: 2 minutes
    python benchmarks/training.py --hidden 48 --layers 2

Runtimes: `dense` is PyTorch without masks (PackedGRU, which beats nn.GRU: benchmarks/chirodiff_step.py), `masked` the
same with a SparseEngine, `sparse` the kernels of `train.runtime: sparse`, `rigl` those with a topology update each 100
steps: 99 sparse steps and one dense one with the update in it, weighted so. torch.nn.utils.prune is the peer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other file; a script has only its own folder

from benchmarks.peak_memory import made
from raysparse import rng
from raysparse.diffusion.losses import eps_mse
from raysparse.models.chirodiff import ChiroDiff, Config, build, sparse_step
from raysparse.sparse import SparseEngine

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x, timesteps, lengths, eps
INTERVAL = 100  # steps between two topology updates
LONGEST = 165  # points


def batch_of(turn: int, size: int) -> Batch:
    draw = rng.generator(0, "training benchmark", step=turn)
    lengths = (88.6 + 17.4 * torch.randn(size, generator=draw)).round().long().clamp(20, LONGEST)
    if turn == 0:  # not timed: memory grows to its largest, else the first steps of some hundred MB wait for pages
        lengths[0] = LONGEST
    x = torch.randn(size, int(lengths.max()), 3, generator=draw)
    return x, torch.randint(0, 1000, (size,), generator=draw), lengths, torch.randn(x.shape, generator=draw)


class Runner:
    """One model with its optimizer and its masks, and how it steps."""

    def __init__(self, options: argparse.Namespace, sparsity: float, kind: str) -> None:
        self.model = build(Config(hidden=options.hidden, layers=options.layers), seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
        self.engine: SparseEngine | None = None
        self.network: nn.Module = self.model
        if kind in ("masked", "sparse", "update"):
            method = {"method": "rigl", "update_interval": 1, "prune_ratio": 0.05} if kind == "update" else {}
            self.engine = SparseEngine(
                self.model, self.optimizer, **{"method": "static", "sparsity": sparsity, "allocation": "er"} | method
            )
        if kind == "sparse":
            assert self.engine is not None
            self.network = sparse_step(self.model, self.engine.masks)
        if kind == "prune":
            self._prune(sparsity)

    def _prune(self, sparsity: float) -> None:
        """The same masks through PyTorch's own tool."""
        twin = build(self.model.config, seed=0)
        masks = SparseEngine(
            twin, torch.optim.SGD(twin.parameters()), method="static", sparsity=sparsity, allocation="er"
        ).masks
        for name, mask in masks.items():
            owner, _, weight = name.rpartition(".")
            prune.custom_from_mask(self.model.get_submodule(owner), weight, mask)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)

    def gradients(self, batch: Batch) -> float:
        x, timesteps, lengths, eps = batch
        self.optimizer.zero_grad()
        loss = eps_mse(self.network(x, timesteps, lengths), eps, lengths)
        loss.backward()
        if self.engine is not None:
            self.engine.mask_gradients()
        return float(loss.detach())

    def step(self, batch: Batch) -> None:
        self.gradients(batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        if self.engine is not None:
            self.engine.after_step()


def gradients_of(options: argparse.Namespace, sparsity: float, kind: str) -> ChiroDiff:
    """A model that has those of the first batch."""
    runner = Runner(options, sparsity, kind)
    runner.gradients(batch_of(0, options.batch))
    return runner.model


def difference(model: ChiroDiff, reference: ChiroDiff) -> float:
    """Largest relative difference of the gradient of a parameter."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float((a.grad - b.grad).norm() / b.grad.norm().clamp_min(1e-12)) for a, b in pairs)  # type: ignore[operator, union-attr]


def measure(options: argparse.Namespace, sparsity: float) -> None:
    """Print the rows of one sparsity."""
    kinds = ["dense"] + (["masked", "sparse", "update", "prune"] if sparsity else ["sparse"])
    off = difference(*(gradients_of(options, sparsity, kind) for kind in ("sparse", "masked" if sparsity else "dense")))
    clock: Callable[[], float] = time.process_time if options.cpu_time else time.perf_counter
    makers = {kind: partial(Runner, options, sparsity, kind) for kind in kinds}
    runners, memory = made(makers, lambda runner: runner.step(batch_of(0, options.batch)))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(1, options.turns + 1):
        batch = batch_of(turn, options.batch)
        for kind, runner in runners.items():
            start = clock()
            runner.step(batch)
            seconds[kind].append(clock() - start)
    if sparsity:
        pairs = zip(seconds["sparse"], seconds.pop("update"), strict=True)
        seconds["rigl"] = [((INTERVAL - 1) * plain + update) / INTERVAL for plain, update in pairs]
        seconds["torch.nn.utils.prune"] = seconds.pop("prune")
        memory |= {"rigl": memory["update"], "torch.nn.utils.prune": memory["prune"]}
    for kind, times in seconds.items():
        ratios = [dense / mine for dense, mine in zip(seconds["dense"], times, strict=True)]
        row = [f"chirodiff h={options.hidden} l={options.layers}", f"{sparsity:g}", "unstructured", kind]
        row.append(f"{statistics.median(times) * 1e3:.1f}")
        row.append(f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
        row.append(f"{1 - sparsity if kind in ('sparse', 'rigl') else 1:.2f}")
        row += [memory[kind], f"{off:.0e}" if kind == "sparse" else "–"]
        print("| " + " | ".join(row) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=96, help="h (default 96)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the GRU (default 3)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--batch", type=int, default=128, help="sketches per step (default 128)")
    parser.add_argument("--turns", type=int, default=7, help="measured turns (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread on a machine in use")
    parser.add_argument("--quick", action="store_true", help="one small model, 8 sketches: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.hidden, options.layers, options.sparsity, options.batch, options.turns = 8, 2, [0, 0.9], 8, 1
    torch.set_num_threads(options.threads)
    clock = "CPU time" if options.cpu_time else "wall clock"
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s), {clock}, "
        f"batch {options.batch}\n\n"
        "| model | S | pattern | runtime | ms a step | times faster than dense | FLOPs | peak MiB "
        "| gradients differ by |\n" + "|---" * 9 + "|"
    )
    for sparsity in options.sparsity:
        measure(options, sparsity)


if __name__ == "__main__":
    main()

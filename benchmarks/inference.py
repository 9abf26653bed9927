"""Sampling with sparse weights: what skipping the zeros saves, end to end, beside the dense path and other libraries.

One run is a whole DDIM sampling of ChiroDiff (all of it: velocities, time features and read-out too) with
ER masks over random weights; time does not depend on what the weights are. Lengths are drawn from KanjiVG's (mean 88.6
points, at most 165) or, without the file, from a normal distribution like them. The runtimes take turns on the same
noise in one process; a ratio is of two runs of the same turn. Peak memory is what a runtime's weights and its first
prediction take.

    python benchmarks/inference.py                      # h = 96, 3 layers, 512 sketches, one thread: 8 minutes
    python benchmarks/inference.py --peers --sketches 128 --ddim-steps 5     # torch.nn.utils.prune, CSR of torch, scipy

Runtimes: `dense` is PyTorch (PackedGRU, which beats nn.GRU: benchmarks/chirodiff_step.py). `dense kernel` is ours with
no zero skipped, the fastest dense path there is here. `sparse` skips them. FLOPs are those of the weights, as a ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other file; a script has only its own folder

from benchmarks.peak_memory import made
from raysparse import rng
from raysparse.diffusion import ddim
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.models._sparse_chirodiff import SparseChiroDiff
from raysparse.models.chirodiff import ChiroDiff, Config, build, sparse_runtime
from raysparse.sparse import SparseEngine

SCHEDULE = {"timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
DENSE = "dense"


def masked_model(hidden: int, layers: int, sparsity: float) -> tuple[ChiroDiff, dict[str, Tensor]]:
    """A model with random ER masks, and the masks."""
    model = build(Config(hidden=hidden, layers=layers), seed=0)
    engine = SparseEngine(
        model, torch.optim.SGD(model.parameters()), method="static", sparsity=sparsity, allocation="er"
    )
    return model.eval().requires_grad_(False), engine.masks


def lengths_of(count: int, kanjivg: Path | None) -> Tensor:
    if kanjivg is None:
        draw = rng.generator(0, "inference benchmark lengths")
        return (88.6 + 17.4 * torch.randn(count, generator=draw)).round().long().clamp(20, 165)
    from raysparse.data import prepared

    folder = prepared.prepare("kanjivg", {}, source=kanjivg, root=prepared.default_root())
    found = prepared.open_split(folder, "train").lengths
    return torch.from_numpy(np.random.default_rng(0).choice(found, count).astype(np.int64))


def dense_kernel(model: ChiroDiff) -> nn.Module:
    """Our kernel with no zero skipped."""
    return SparseChiroDiff(model, dense_from=0.0)


def pruned(model: ChiroDiff, masks: dict[str, Tensor]) -> nn.Module:
    """torch.nn.utils.prune: a hook multiplies with the mask before each forward pass."""
    copy = build(model.config, seed=0).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    for name, mask in masks.items():
        owner, _, weight = name.rpartition(".")
        prune.custom_from_mask(copy.get_submodule(owner), weight, mask)
    return copy


class CsrGRU(nn.Module):
    """A bidirectional GRU on packed sequences whose weights are CSR matrices of another library, stepped in Python."""

    def __init__(self, gru: nn.GRU, csr: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers = [
            [
                (
                    csr(getattr(gru, f"weight_ih_{end}")),
                    csr(getattr(gru, f"weight_hh_{end}")),
                    getattr(gru, f"bias_ih_{end}")[:, None],
                    getattr(gru, f"bias_hh_{end}")[:, None],
                )
                for end in (f"l{layer}", f"l{layer}_reverse")
            ]
            for layer in range(gru.num_layers)
        ]
        self.hidden = gru.hidden_size

    def forward(self, packed: PackedSequence) -> PackedSequence:
        sizes = packed.batch_sizes.tolist()
        ends = np.cumsum([0, *sizes]).tolist()
        x = packed.data.T.contiguous()
        for sides in self.layers:
            out = torch.empty(2 * self.hidden, ends[-1])
            for side, (w_in, w_state, b_in, b_state) in enumerate(sides):
                gates = product(w_in, x) + b_in
                state = torch.zeros(self.hidden, sizes[0])
                for t in reversed(range(len(sizes))) if side else range(len(sizes)):
                    now = state[:, : sizes[t]]
                    r_in, z_in, n_in = gates[:, ends[t] : ends[t + 1]].chunk(3)
                    r_h, z_h, n_h = (product(w_state, now.contiguous()) + b_state).chunk(3)
                    z = torch.sigmoid(z_in + z_h)
                    n = torch.tanh(n_in + torch.sigmoid(r_in + r_h) * n_h)
                    state[:, : sizes[t]] = torch.lerp(n, now, z)
                    out[side * self.hidden : (side + 1) * self.hidden, ends[t] : ends[t + 1]] = state[:, : sizes[t]]
            x = out
        return packed._replace(data=x.T.contiguous())


def product(weight: Any, x: Tensor) -> Tensor:
    found = weight @ (x if isinstance(weight, Tensor) else x.numpy())
    return found if isinstance(found, Tensor) else torch.from_numpy(found)


def with_csr(model: ChiroDiff, csr: Callable[[Tensor], Any]) -> nn.Module:
    found = copy.deepcopy(model)
    found.gru = CsrGRU(model.gru, csr)  # type: ignore[assignment]
    return found


def peers(model: ChiroDiff, masks: dict[str, Tensor]) -> dict[str, Callable[[], nn.Module]]:
    import scipy.sparse

    return {
        "torch.nn.utils.prune": lambda: pruned(model, masks),
        "torch CSR": lambda: with_csr(model, lambda weight: weight.to_sparse_csr()),
        "scipy CSR": lambda: with_csr(model, lambda weight: scipy.sparse.csr_array(weight.numpy())),
    }


def measure(options: argparse.Namespace, sparsity: float, lengths: Tensor) -> None:
    """Print the rows of one sparsity."""
    model, masks = masked_model(options.hidden, options.layers, sparsity)
    makers: dict[str, Callable[[], nn.Module]] = {
        DENSE: lambda: copy.deepcopy(model),
        "dense kernel": lambda: dense_kernel(model),
        "sparse": lambda: sparse_runtime(model),
    }
    if options.peers:
        makers |= peers(model, masks)
    noise = torch.randn(len(lengths), int(lengths.max()), 3, generator=rng.generator(0, "inference benchmark noise"))
    schedule = NoiseSchedule(**SCHEDULE)  # type: ignore[arg-type]
    clock = time.process_time if options.cpu_time else time.perf_counter

    def draw(network: nn.Module, steps: int) -> Tensor:
        return ddim.sample(network, schedule, noise, steps=steps, cond={"lengths": lengths})

    results: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    with torch.inference_mode():
        runtimes, memory = made(makers, lambda network: draw(network, 1))
        for _ in range(options.turns):
            for name, network in runtimes.items():
                start = clock()
                results[name] = draw(network, options.ddim_steps)
                seconds[name].append(clock() - start)
    flops = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    for name, times in seconds.items():
        off = float((results[name] - results[DENSE]).abs().max() / results[DENSE].abs().max())
        row = [f"chirodiff h={options.hidden} l={options.layers}", f"{sparsity:g}", "unstructured", name]
        row.append(f"{statistics.median(times) / len(lengths) * 1e3:.2f}")
        for base in (DENSE, "dense kernel"):
            ratios = [one / mine for one, mine in zip(seconds[base], times, strict=True)]
            row.append(f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
        row += [
            f"{flops:.3f}",
            memory[name],
            f"{off:.0e}",
        ]
        print("| " + " | ".join(row) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=96, help="h (default 96)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the GRU (default 3)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--sketches", type=int, default=512, help="drawn at a time (default 512)")
    parser.add_argument("--ddim-steps", type=int, default=10, help="(default 10; time is proportional)")
    parser.add_argument("--turns", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--kanjivg", type=Path, help="kanji.rdp100.npz: lengths of the real sketches")
    parser.add_argument("--peers", action="store_true", help="other libraries beside it; they are slow")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread on a machine in use")
    parser.add_argument("--quick", action="store_true", help="one small model, 8 sketches: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.hidden, options.layers, options.sparsity, options.sketches = 8, 1, [0.9], 8
        options.ddim_steps, options.turns, options.peers = 2, 1, True
    torch.set_num_threads(options.threads)
    clock = "CPU time" if options.cpu_time else "wall clock"
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s), {clock}, "
        f"{options.sketches} sketches, {options.ddim_steps} DDIM steps\n"
    )
    print(
        "| model | S | pattern | runtime | ms a sample | times faster than dense | than the dense kernel | FLOPs "
        "| peak MiB | difference, of the largest value |\n|" + "---|" * 10
    )
    lengths = lengths_of(options.sketches, options.kanjivg)
    for sparsity in options.sparsity:
        measure(options, sparsity, lengths)


if __name__ == "__main__":
    main()

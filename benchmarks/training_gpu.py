"""A training step on a GPU: dense by every means, masked, and with blocks of zeros left out.

    python benchmarks/training_gpu.py                        # U-ViT small/2 and large/2, 7 minutes at most
    python benchmarks/training_gpu.py --model ddpm_unet --seconds 200

Needs PyTorch with triton, diffusers, safetensors, numpy and pydantic, and this checkout; no Ray, nothing installed.

A step is prediction, loss, backward, gradient masking, AdamW and the weights' running mean, of pictures at hand:
CIFAR-10's for U-ViT small/2 (44.3M parameters), ImageNet's latents for large/2 (286.8M, without classes). Rows take
turns of --steps steps with the base, bf16 + compile + CUDA graphs; a ratio is of two runs of the same turn. bf16 is
autocast over float32 weights, with channels_last. `masked` computes all products and zeroes what is pruned; `sparse` is
`train.runtime: sparse`. S is of all maskable weights, ERK. A row of updates times the topology update alone, on the
device. FLOPs are those of the weights, forward. Peak memory is of the row alone. The difference is of all gradients
together, relative to float32's with the same weights. What the time left is too short for, or what fails, is a row that
says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine without Ray has no `pip install raysparse`

from benchmarks.inference_gpu import QUICK
from benchmarks.training_pictures import batch_of, difference
from raysparse import plugins
from raysparse.metrics import flops
from raysparse.models import uvit
from raysparse.sparse import SparseEngine
from raysparse.train.ema import Ema

MIB = 2**20
COLUMNS = (
    "model",
    "S",
    "pattern",
    "runtime",
    "ms a step",
    "steps per s",
    "times as fast as the base (min / median / max)",
)
COLUMNS += ("FLOPs", "peak MiB", "difference")


LARGE = {**uvit.IMAGENET256_LARGE, "num_classes": None}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "uvit": ("uvit", {}),
    "uvit_large": ("uvit", LARGE),
    "ddpm_unet": ("ddpm_unet", {}),
}


def module_and_config(name: str, quick: bool) -> tuple[Any, Any]:
    """Of a name that --model takes."""
    file, settings = MODELS[name]
    module = plugins.load("models", file)
    return module, module.Config(**(QUICK[file] if quick else settings))


@dataclasses.dataclass(frozen=True)
class Row:
    """How to train. updates: only the topology update is timed."""

    runtime: str = "dense"  # or masked, sparse
    sparsity: float = 0.0
    pattern: dict[str, Any] = dataclasses.field(default_factory=dict)
    bf16: bool = True
    compiled: bool = True
    graphs: bool = False
    updates: bool = False

    @property
    def cells(self) -> list[str]:
        how = [self.runtime, "bf16" if self.bf16 else "float32", *(["compile"] if self.compiled else [])]
        how += ["CUDA graphs"] if self.graphs else []
        named = f"{self.pattern.get('pattern', '')} {self.pattern.get('block', '')}".strip()
        return [f"{self.sparsity:g}", named, "topology update (rigl)" if self.updates else " + ".join(how)]


def blocks(edge: int) -> dict[str, Any]:
    return {"pattern": "block", "block": edge}


BASE = Row(graphs=True)
ROWS = (
    Row("sparse", 0.9, blocks(64), graphs=True),
    Row("masked", 0.9, updates=True, compiled=False),
    Row("masked", 0.9, blocks(64), updates=True, compiled=False),
    Row("masked", 0.9, graphs=True),
    Row("sparse", 0.8, blocks(64), graphs=True),
    Row("sparse", 0.95, blocks(64), graphs=True),
    Row(),
    Row("sparse", 0.9, blocks(64)),
    Row(compiled=False, bf16=False),
    Row("sparse", 0.95, blocks(32), graphs=True),
    Row(compiled=False),
)


class Runner:
    """One row's model and step, as raysparse.train.loop makes it."""

    def __init__(self, options: argparse.Namespace, name: str, row: Row) -> None:
        self.row, self.device = row, torch.device(options.device)
        module, config = module_and_config(name, options.quick)
        layout = torch.channels_last if row.bf16 else torch.contiguous_format
        self.model: nn.Module = module.build(config, seed=0).to(self.device, memory_format=layout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        updates = {"update_interval": 2, "prune_ratio": 0.3} if row.updates else {}
        masked = {"sparsity": row.sparsity, "allocation": "erk", **row.pattern, **updates} if row.sparsity else {}
        method = "dense" if not masked else "rigl" if row.updates else "static"
        self.engine = SparseEngine(self.model, self.optimizer, method=method, **masked)
        self.average = Ema(self.model, 0.9999)
        self.shadow = self.average.parameters()
        self.network: Callable[..., Tensor] = self.model
        if row.runtime == "sparse":
            self.network = module.sparse_step(self.model, self.engine.masks)
        if row.compiled and self.device.type == "cuda":
            mode = "reduce-overhead" if row.graphs else "default"
            self.network = torch.compile(self.network, dynamic=False, mode=mode)
        batch = batch_of(0, options.pictures, config.sample_size, config.in_channels)
        given = (tensor.to(self.device) for tensor in batch)
        self.x, self.timesteps, self.eps = given
        if row.bf16:
            self.x = self.x.to(memory_format=torch.channels_last)

    def gradients(self, network: Callable[..., Tensor], bf16: bool) -> None:
        self.optimizer.zero_grad()
        half = bf16 and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss = (network(self.x, self.timesteps) - self.eps).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.engine.mask_gradients()

    def off(self) -> float:
        """The gradients' difference from float32's."""
        self.gradients(self.model, bf16=False)
        exact = [parameter.grad.clone() for parameter in self.model.parameters() if parameter.grad is not None]
        self.gradients(self.network, self.row.bf16)
        pairs = zip((parameter.grad for parameter in self.model.parameters()), exact, strict=True)
        return difference([(got, want) for got, want in pairs if got is not None])

    def step(self) -> float:
        """-> seconds of its topology update, where rows of updates have one."""
        self.gradients(self.network, self.row.bf16)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.engine.average(self.shadow, lambda: self.average.update(10**6))
        begun, before = self._now(), self.engine.updates
        self.engine.after_step()
        self.engine.after_average(self.shadow)
        return self._now() - begun if self.engine.updates > before else 0.0

    def seconds(self, steps: int) -> float:
        """Of a step, or of an update: the mean."""
        self._wait()
        begun = time.perf_counter()
        updates = [self.step() for _ in range(steps)]
        self._wait()
        spent = [update for update in updates if update]
        return statistics.mean(spent) if self.row.updates else (time.perf_counter() - begun) / steps

    def _now(self) -> float:
        if self.row.updates:
            self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Table:
    """The rows of one model."""

    def __init__(self, options: argparse.Namespace, name: str, ends: float) -> None:
        self.options, self.name, self.ends = options, name, ends
        self.longest = {True: 0.0, False: 0.0}  # seconds that a row took, compiled or not
        self.base: Runner | None = None
        module, config = module_and_config(name, options.quick)
        with torch.device("meta"):
            empty = module.build(config, seed=0)
            self.macs = flops.forward_macs(empty, module.example(config, 1, 1, "meta"), 1)

    def row(self, row: Row) -> None:
        begun = time.perf_counter()
        start = f"| {' | '.join([self.name, *row.cells])} | "
        if begun + self.longest[row.compiled] > self.ends:
            print(f"{start}unmeasured: no time left |", flush=True)
            return
        try:
            cells = self._measured(row)
        except Exception as error:  # one row that cannot run ends no other
            print(f"{start}unmeasured: {type(error).__name__}: {' '.join(str(error).split())[:300]} |", flush=True)
            return
        self.longest[row.compiled] = max(self.longest[row.compiled], time.perf_counter() - begun)
        print(f"{start}{' | '.join(cells)} |", flush=True)

    def _measured(self, row: Row) -> list[str]:
        held = self._memory(peak=False)
        runner = Runner(self.options, self.name, row)
        off = runner.off()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        runner.seconds(3)
        peak = f"{(self._memory(peak=True) - held) / MIB:.0f}" if self.options.device == "cuda" else "unmeasured"
        base = self.base = self.base or runner
        times, ratios = [], []
        for _ in range(self.options.turns):
            other = base.seconds(self.options.steps)
            times.append(runner.seconds(self.options.steps))
            ratios.append(other / times[-1])
        if self.options.profile:
            self._profile(runner)
        each = statistics.median(times)
        masks = {name: float(mask.float().mean()) for name, mask in runner.engine.masks.items()}
        return [
            f"{each * 1e3:.2f}",
            "" if row.updates else f"{1 / each:.2f}",
            f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}",
            f"{flops.forward_flops(self.macs, masks) / flops.forward_flops(self.macs):.3f}",
            peak,
            "" if row.updates else f"{off:.0e}",
        ]

    def _profile(self, runner: Runner) -> None:
        """On stderr: what three steps spend on the device, or on a CPU."""
        with torch.profiler.profile() as seen:
            runner.seconds(3)
        order = f"self_{'cuda' if self.options.device == 'cuda' else 'cpu'}_time_total"
        print(seen.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60), file=sys.stderr)

    def _memory(self, peak: bool) -> int:
        if self.options.device != "cuda":
            return 0
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", nargs="+", default=["uvit", "uvit_large"], choices=MODELS)
    parser.add_argument("--pictures", type=int, default=128, help="per step (default 128)")
    parser.add_argument("--steps", type=int, default=10, help="in a turn (default 10)")
    parser.add_argument("--turns", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--seconds", type=float, default=400, help="a row that would end later is left out (400)")
    parser.add_argument("--profile", action="store_true", help="after each row what its time went to, on stderr")
    parser.add_argument("--quick", action="store_true", help="the smallest models, once: does it run?")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick tries the benchmark, which measures nothing on a CPU")
    if options.quick:
        options.pictures, options.steps, options.turns = 1, 2, 1
    torch._dynamo.config.recompile_limit = 1000  # every row's model is another one of the same code
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device}, {options.pictures} pictures, turns of {options.steps} steps\n")
    if options.device == "cpu":
        print(
            "Only tried, on a CPU: all in float32, nothing compiled, its own kernels; the times say nothing of a GPU.\n"
        )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    begun = time.perf_counter()
    for index, name in enumerate(options.model):  # models share what time is left
        now = time.perf_counter()
        table = Table(options, name, now + (begun + options.seconds - now) / (len(options.model) - index))
        for row in (BASE, *ROWS):
            table.row(row)


if __name__ == "__main__":
    main()

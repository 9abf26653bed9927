"""A training step of Latent Diffusion's U-Net: dense, masked, in bf16, compiled, channels_last; time and memory.

    python benchmarks/unet_step.py             # 1.0M parameters, about two minutes on two CPU cores
    python benchmarks/unet_step.py --full      # the paper's 274,056,163 parameters, batches of 12 and 48, for a GPU

Needs PyTorch, diffusers, safetensors, numpy and pydantic, and this checkout; no Ray, no Optuna, nothing installed.

A step is noise prediction, loss, backward, gradient masking and AdamW; latents are at hand, and the weights' running
mean is left out. All variants take turns, one step each per round, in an order that rotates; a ratio is of two steps
of the same round. Rounds in which a topology is updated are timed apart. Memory is of the variant alone: weights,
gradients, moments and masks, and the most that one step adds. Compilations are counted where PyTorch hands a graph to
the compiler: one, whatever the topology did; more is an error (exit 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine without Ray has no `pip install raysparse`

from raysparse.models import latent_unet
from raysparse.sparse import SparseEngine

SMALL: dict[str, Any] = {  # the same parts in two levels
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "attention_levels": (False, True),
}
FULL_PARAMETERS = 274_056_163
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Variant:
    method: str = "dense"
    bf16: bool = False
    compiled: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        extras = (("bf16", self.bf16), ("compile", self.compiled), ("channels_last", self.channels_last))
        return " + ".join([self.method, *(name for name, has in extras if has)])

    @property
    def dense(self) -> Variant:
        """The same without masks."""
        return dataclasses.replace(self, method="dense")


VARIANTS = (
    Variant(),
    Variant("static"),
    Variant("rigl"),
    Variant(bf16=True),
    Variant("rigl", bf16=True),
    Variant(bf16=True, compiled=True),
    Variant("rigl", bf16=True, compiled=True),
    Variant(channels_last=True),
    Variant("rigl", channels_last=True),
    Variant(bf16=True, compiled=True, channels_last=True),
    Variant("rigl", bf16=True, compiled=True, channels_last=True),
)
# A compilation takes a CPU about a minute, dense and masked share one (the graph is the same), channels_last does not.
SMALL_VARIANTS = tuple(variant for variant in VARIANTS if not (variant.compiled and variant.channels_last))
QUICK = (Variant(), Variant("rigl"), Variant("rigl", compiled=True))  # does it run?


class Trainer:
    """One variant: model, AdamW, engine, and the step."""

    def __init__(self, variant: Variant, config: latent_unet.Config, batch: int, device: torch.device, args: Any):
        self.variant, self.device = variant, device
        self.compilations, self.backend = 0, args.backend
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model = latent_unet.build(config, seed=0).to(device, memory_format=layout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2.4e-5, weight_decay=1e-2, fused=True)
        dynamic = {"update_interval": args.update_interval, "prune_ratio": 0.5} if variant.method == "rigl" else {}
        sparse = {} if variant.method == "dense" else {"sparsity": args.sparsity, "allocation": "erk", **dynamic}
        self.engine = SparseEngine(self.model, self.optimizer, method=variant.method, **sparse)
        self.network: nn.Module = self.model
        if variant.compiled:
            self.network = torch.compile(self.model, backend=self._compile, dynamic=False)  # type: ignore[assignment]
        draw = torch.Generator().manual_seed(0)
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        self.x = torch.randn(shape, generator=draw).to(device, memory_format=layout)
        self.eps = torch.randn(shape, generator=draw).to(device, memory_format=layout)
        self.timesteps = torch.randint(0, 1000, (batch,), generator=draw).to(device)

    def step(self) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.variant.bf16):
            loss = (self.network(self.x, self.timesteps) - self.eps).square().mean()
        loss.backward()
        self.engine.mask_gradients()
        self.optimizer.step()
        self.engine.after_step()
        self.optimizer.zero_grad()

    def timed(self) -> tuple[float, bool]:
        """Seconds of a step, and whether it updated the topology."""
        before = self.engine.updates
        synchronise(self.device)
        start = time.perf_counter()
        self.step()
        synchronise(self.device)
        return time.perf_counter() - start, self.engine.updates > before

    def memory(self) -> tuple[int, int]:
        """Bytes of what stays between steps, and the most that a step adds to it, one with a topology update too."""
        kept: dict[int, int] = {}
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        masks = [*self.engine.masks.values(), *self.engine._bits.values()]
        for tensor in (*self.model.parameters(), *moments, *masks):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
        before, added = self.engine.updates, peak_of(self.step, self.device)
        while self.variant.method == "rigl" and self.engine.updates == before:
            added = max(added, peak_of(self.step, self.device))
        return sum(kept.values()), added

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.compilations += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def peak_of(function: Any, device: torch.device) -> int:
    """The most bytes of tensors that are alive at once during a call, beyond those alive before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(variants: Sequence[Variant], config: latent_unet.Config, batch: int, args: Any) -> list[dict[str, Any]]:
    """A row per variant, in their order. One that does not fit or does not compile says why instead."""
    device = torch.device(args.device)
    trainers: dict[Variant, Trainer] = {}
    rows: dict[Variant, dict[str, Any]] = {variant: {"variant": variant.name, "batch": batch} for variant in variants}
    for variant in variants:
        say(f"batch {batch}: {variant.name}: building and the first two steps")
        try:
            trainer = Trainer(variant, config, batch, device, args)
            trainer.step()  # makes the optimizer's state, compiles, picks kernels
            trainer.step()
            kept, added = trainer.memory()
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            rows[variant]["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            trainer = None  # type: ignore[assignment]
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        trainers[variant] = trainer
        rows[variant] |= {"state_bytes": kept, "peak_bytes": kept + added}
    taken = interleaved(trainers, args.rounds)
    for variant, trainer in trainers.items():
        plain = [second for second, updated in taken[variant] if not updated]
        updates = [second for second, updated in taken[variant] if updated]
        rows[variant] |= {
            "seconds": spread(plain),
            "to_dense": ratios(taken, variant, Variant()),
            "to_its_dense": ratios(taken, variant, variant.dense),
            "update_step_seconds": statistics.median(updates) if updates else None,
            "topology_updates": trainer.engine.updates,
            "compilations": trainer.compilations if variant.compiled else None,
            "density": 1 - trainer.engine.sparsity,
        }
    return list(rows.values())


def interleaved(trainers: dict[Variant, Trainer], rounds: int) -> dict[Variant, list[tuple[float, bool]]]:
    taken: dict[Variant, list[tuple[float, bool]]] = {variant: [] for variant in trainers}
    names = list(trainers)
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        shift = turn % max(len(names), 1)
        for variant in names[shift:] + names[:shift]:
            taken[variant].append(trainers[variant].timed())
    return taken


def ratios(
    taken: dict[Variant, list[tuple[float, bool]]], variant: Variant, base: Variant
) -> tuple[float, float, float] | None:
    """Least, median and largest ratio of two steps of the same round; None where the base was not measured."""
    if base not in taken:
        return None
    pairs = zip(taken[variant], taken[base], strict=True)
    return spread([mine / theirs for (mine, updated), (theirs, _) in pairs if not updated])


def spread(numbers: Sequence[float]) -> tuple[float, float, float]:
    return min(numbers), statistics.median(numbers), max(numbers)


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"\nbatch {rows[0]['batch']}")
    heads = ("seconds a step", "x dense fp32, same round", "x its dense", "update step", "peak GiB", "compiled")
    print(f"{'':34}{heads[0]:^24}{heads[1]:^24}{heads[2]:>12}{heads[3]:>13}{heads[4]:>10}{heads[5]:>10}")
    print(f"{'':34}{'min    median   max':^24}{'min    median   max':^24}{'median':>12}{'seconds':>13}")
    for row in rows:
        if "failed" in row:
            print(f"{row['variant']:34} not measured: {row['failed']}")
            continue
        low, middle, high = row["seconds"]
        cells = f"{low:8.4f}{middle:8.4f}{high:8.4f}"
        cells += "{:8.3f}{:8.3f}{:8.3f}".format(*row["to_dense"]) if row["to_dense"] else " " * 24
        cells += f"{row['to_its_dense'][1]:12.3f}" if row["to_its_dense"] else " " * 12
        cells += f"{row['update_step_seconds']:13.4f}" if row["update_step_seconds"] is not None else " " * 13
        cells += f"{row['peak_bytes'] / GIB:10.3f}"
        cells += f"{row['compilations']:9}x" if row["compilations"] is not None else ""
        print(f"{row['variant']:34}{cells}")


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a small model of the same parts (the default)")
    size.add_argument("--full", action="store_true", help="the paper's U-Net, 274,056,163 parameters")
    size.add_argument("--quick", action="store_true", help="a tiny model, three variants, four rounds: does it run?")
    parser.add_argument("--batch", type=int, nargs="+", help="examples per step (default 12; --full: 12 48)")
    parser.add_argument("--rounds", type=int, help="measured rounds (default 9; --full: 20)")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--update-interval", type=int, default=4, help="steps between topology updates (default 4)")
    parser.add_argument("--backend", default="inductor", help="what torch.compile hands its graphs to")
    parser.add_argument("--variant", action="append", help="only those whose name contains this; repeatable")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="the rows as JSON instead of a table")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (20 if args.full else 4 if args.quick else 9)
    torch.set_num_threads(args.threads)
    options = {} if args.full else latent_unet.SMALL if args.quick else SMALL
    config = latent_unet.Config(**options)
    with torch.device("meta"):
        count = sum(weight.numel() for weight in latent_unet.build(config, seed=0).parameters())
    assert not args.full or count == FULL_PARAMETERS
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"cpu, {args.threads} threads"
    offered = QUICK if args.quick else VARIANTS if args.full else SMALL_VARIANTS
    variants = [variant for variant in offered if _chosen(variant, args.variant)]
    if not variants:
        parser.error(f"no variant's name contains {' or '.join(args.variant)}; they are {[v.name for v in offered]}")
    header = {"torch": torch.__version__, "device": device, "parameters": count, "sparsity": args.sparsity}
    if not args.json:
        print(f"torch {torch.__version__}, {device}; {count:,} parameters, S {args.sparsity}, {args.rounds} rounds")
    results = []
    for batch in args.batch or ((12, 48) if args.full else (4,) if args.quick else (12,)):
        rows = measure(variants, config, batch, args)
        results += rows
        say("")
        if not args.json:
            show(rows)
    if args.json:
        print(json.dumps(header | {"rows": results}))
    again = [row["variant"] for row in results if (row.get("compilations") or 1) > 1]
    if again:
        sys.exit(f"compiled more than once: {', '.join(again)}")


def _chosen(variant: Variant, names: Sequence[str] | None) -> bool:
    return not names or any(name in variant.name for name in names)


if __name__ == "__main__":
    main()

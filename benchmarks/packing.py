"""Many small trials on one device: trial-steps per second of ChiroDiff, against one trial that has it to itself.

    python benchmarks/packing.py               # the papers' three sizes; on a GPU 8, 16 and 32 trials, on a CPU 4
    python benchmarks/packing.py --threads 1 --trials 4 --sizes 48x2

Needs PyTorch, diffusers, safetensors, numpy and pydantic, and this checkout; no Ray, no Optuna, nothing installed.

Trials differ in seed, data, lr, method and S: rigl .5, static .75, magran .9, dense, and again. A step is noising,
prediction, loss, backward, gradient masking, clipping, AdamW and the weights' running mean, on 128 sketches as long as
KanjiVG's (mean 88.6 points, at most 165) which are at hand; at the paper's interval of 800 steps none of those timed
updates a topology. The ways to run trials take turns of a few steps each; a ratio is of trial-steps per second within
one turn, to the first row's. FLOPs ratio: mean 1 - S, which a kernel that leaves zeros out would compute; all products
here are dense. Peak memory is of a GPU's tensors, or what processes hold beside their libraries and data. The ways:

    alone             one trial, as `raysparse train` steps it
    alone, cuDNN      the same with PyTorch's GRU, which raysparse's kernel stands for on a GPU
    alone, recorded   as with `train.cuda_graph`: prediction and gradients are one CUDA graph each
    processes         each in a process of its own, together on the device: a sweep with gpus_per_worker: 1 / trials
    processes, MPS    the same under a Multi-Process Service of this script's own, which lets their kernels overlap;
                      also with `train.cuda_graph`, "recorded"
    one by one        in one process, a step of each in turn
    stacked           in one process, prediction and gradients in batched products over a leading trial dimension
    ... CUDA graph    the whole step recorded once and replayed, over sketches padded to the longest there may be

On a CPU a stack has packed points and PyTorch's own operations: see stacked_chirodiff.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the other file; a script has it already
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine without Ray has no `pip install raysparse`

from peak_memory import Peak
from stacked_chirodiff import Batch, Stack, padded
from worker_processes import MPS_CONTROL, Mps, Processes

from raysparse import rng
from raysparse.diffusion.losses import eps_mse
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.models.chirodiff import ChiroDiff, Config, build
from raysparse.sparse import SparseEngine
from raysparse.train.conditions import on_device
from raysparse.train.ema import Ema
from raysparse.train.graphed import Graphed

SIZES = ("48x2", "96x3", "128x3")  # h x layers: VMNIST, KanjiVG, QuickDraw
MIX = (("rigl", 0.5), ("static", 0.75), ("magran", 0.9), ("dense", 0.0))  # method and S of trials 0, 1, ...
COLUMNS = ("parameters", "S", "pattern", "runtime", "trials", "ms per step of all", "trial-steps per s")
COLUMNS += ("x alone (min / median / max)", "FLOPs ratio", "peak memory")
LONGEST = 165  # points, as in KanjiVG
LATE = 10**6  # updates of the running mean: its warm-up is over
MOST_PROCESSES = 16  # each takes some hundred MB of a GPU for its CUDA context
HAS_GPU = torch.cuda.is_available()


@dataclasses.dataclass(frozen=True)
class Work:
    """What all ways do: the model's size, the batch, the device."""

    hidden: int
    layers: int
    batch: int = 128
    longest: int = LONGEST
    interval: int = 800  # steps between topology updates
    device: str = "cpu"

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def batch_of(work: Work, trial: int, step: int) -> Batch:
    draw = rng.generator(trial, "packing", step=step)
    lengths = work.longest * (88.6 + 17.4 * torch.randn(work.batch, generator=draw)) / LONGEST
    shape = (work.batch, work.longest, 3)
    return Batch(
        torch.randn(shape, generator=draw),
        torch.randn(shape, generator=draw),
        torch.randint(0, 1000, (work.batch,), generator=draw),
        lengths.round().long().clamp(1, work.longest),
    )


class Trial:
    """One trial as the project trains it; `step` is the loop's, without its bookkeeping."""

    def __init__(self, work: Work, number: int, recorded: bool = False) -> None:
        self.number, self.device = number, work.device
        method, sparsity = MIX[number % len(MIX)]
        settings: dict[str, Any] = {} if method == "dense" else {"sparsity": sparsity}
        if method in ("rigl", "magran"):
            settings |= {"update_interval": work.interval, "prune_ratio": 0.3}
        self.model = build(Config(hidden=work.hidden, layers=work.layers), seed=number).to(work.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-3 * (1 + number % 3),
            weight_decay=1e-2,
            fused=True,
            capturable=work.device == "cuda",
        )
        self.network: Callable[..., Tensor] = Graphed(self.model) if recorded else self.model
        self.engine = SparseEngine(self.model, self.optimizer, method=method, seed=number, **settings)
        self.average = Ema(self.model, 0.9999)
        self.shadow = self.average.parameters()
        self.schedule = NoiseSchedule()

    def step(self, batch: Batch) -> None:
        place = torch.device(self.device)
        x, eps, timesteps = (on_device(tensor, place) for tensor in (batch.x, batch.eps, batch.timesteps))
        self.optimizer.zero_grad()
        # Lengths are left on the host, where cuDNN's packing needs them.
        prediction = self.network(self.schedule.add_noise(x, eps, timesteps), timesteps, lengths=batch.lengths)
        eps_mse(prediction, eps, batch.lengths).backward()  # type: ignore[no-untyped-call]
        self.apply()
        self.close()

    def apply(self) -> None:
        """From the gradients to the new weights and their mean."""
        self.engine.mask_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.engine.average(self.shadow, lambda: self.average.update(LATE))

    def close(self) -> None:
        """Count the step; update the topology where that is due."""
        self.engine.after_step()
        self.engine.after_average(self.shadow)


class Graph:
    """A stack's step as a CUDA graph. A step whose topology update is due would run outside it, one in 800."""

    def __init__(self, stack: Stack, batches: Sequence[Batch]) -> None:
        self.stack, self.device = stack, stack.device  # the graph works in the stack's memory, and does not hold it
        self.inputs = padded(batches, self.device)
        side = torch.cuda.Stream()  # PyTorch asks for a few steps on a side stream before a capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                stack.run(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            stack.run(self.inputs)
        # In page-locked memory the next step's batches lie ready while the device works on this one's.
        self.ready = [tensor.cpu().pin_memory() for tensor in self.inputs.tensors()]
        self.taken = torch.cuda.Event()

    def step(self, batches: Sequence[Batch]) -> None:
        new = padded(batches, "cpu").tensors()
        self.taken.synchronize()
        for here, ready, values in zip(self.inputs.tensors(), self.ready, new, strict=True):
            here.copy_(ready.copy_(values), non_blocking=True)
        self.taken.record()
        self.graph.replay()


def worker_command(work: Work, threads: int, recorded: bool) -> list[str]:
    """This script as a worker, but for its trial's number."""
    words = ["--worker", "--threads", threads, "--sizes", f"{work.hidden}x{work.layers}", "--batch", work.batch]
    words += ["--longest", work.longest, "--device", work.device, *(["--recorded"] if recorded else []), "--trials"]
    return [sys.executable, __file__, *map(str, words)]


def serve(work: Work, number: int, recorded: bool) -> None:
    """What a worker does: its peak memory after a step, then so many steps for each line that says how many."""
    peak = Peak(work.device)
    trial, batches = Trial(work, number, recorded), [batch_of(work, number, step) for step in range(4)]
    trial.step(batches[0])
    work.synchronise()
    print(peak.bytes() or 0, flush=True)
    for line in sys.stdin:
        for step in range(int(line)):
            trial.step(batches[step % len(batches)])
        work.synchronise()
        print(0, flush=True)


Stepper = Callable[[int], None]  # takes the step's number


@dataclasses.dataclass
class Way:
    """A row of the table. run(steps): so many steps of each of its trials; None: unmeasured."""

    name: str
    trials: int
    run: Callable[[int], None] | None
    peak_bytes: int = 0  # 0: not known
    unmeasured: str = ""  # why
    rates: list[float] = dataclasses.field(default_factory=list)  # trial-steps per second, by turn


class Ways:
    """All ways to run trials of one size, each ready to run."""

    def __init__(self, work: Work, counts: Sequence[int], threads: int | None) -> None:
        """threads: of each process; None: there are to be none."""
        self.work, self.rows, self.processes = work, list[Way](), list[tuple[Way, Processes]]()
        self.mps = Mps() if work.device == "cuda" and threads is not None and shutil.which(MPS_CONTROL) else None
        self._batches = {(t, s): batch_of(work, t, s) for t in range(max(counts)) for s in range(4)}
        self._eager(0)(0)  # what libraries take once is no way's
        self._add("alone", 1, lambda: [self._eager(0)])
        self._add("alone, cuDNN", 1, lambda: [self._eager(0, cudnn=True)], needs_gpu=True)
        self._add("alone, recorded", 1, lambda: [self._eager(0, recorded=True)], needs_gpu=True)
        self._add("alone, stacked", 1, lambda: [self._stack([0])])
        self._add("alone, CUDA graph", 1, lambda: [self._graph([0])], needs_gpu=True)
        for count in counts:
            self._add_many(range(count), threads)
        for way, processes in self.processes:  # which have started meanwhile
            way.peak_bytes = processes.ready()

    def _add_many(self, numbers: Sequence[int], threads: int | None) -> None:
        count = len(numbers)
        if threads is not None and count <= MOST_PROCESSES:
            if not (self.mps and self.processes):  # without the service more of them are no faster
                self._add_processes("processes", count, threads)
            if self.mps:
                self._add_processes("processes, MPS", count, threads, self.mps)
                self._add_processes("processes, MPS, recorded", count, threads, self.mps, True)
        if not any(row.name == "one by one" for row in self.rows):  # more of them are no faster
            self._add("one by one", count, lambda: [self._eager(number) for number in numbers])
            self._add("one by one, CUDA graph", count, lambda: [self._graph([n]) for n in numbers], needs_gpu=True)
        self._add("stacked", count, lambda: [self._stack(numbers)])
        self._add("stacked, CUDA graph", count, lambda: [self._graph(numbers)], needs_gpu=True)

    def _add_processes(
        self, name: str, count: int, threads: int, mps: Mps | None = None, recorded: bool = False
    ) -> None:
        processes = Processes(worker_command(self.work, threads, recorded), count, mps)
        self.rows.append(Way(name, count, processes.run))
        self.processes.append((self.rows[-1], processes))

    def _add(self, name: str, count: int, make: Callable[[], list[Stepper]], needs_gpu: bool = False) -> None:
        if needs_gpu and self.work.device != "cuda":
            self.rows.append(Way(name, count, None, unmeasured="no GPU"))
            return
        peak = Peak(self.work.device)
        try:
            steppers = make()

            def run(steps: int) -> None:
                for step in range(steps):
                    for stepper in steppers:
                        stepper(step)

            run(1)  # makes the optimizer's state and picks kernels
            self.work.synchronise()
        except torch.OutOfMemoryError:
            self.rows.append(Way(name, count, None, unmeasured="out of memory"))
            return
        self.rows.append(Way(name, count, run, peak.bytes() or 0))

    def _at(self, step: int, numbers: Sequence[int]) -> list[Batch]:
        return [self._batches[number, step % 4] for number in numbers]

    def _eager(self, number: int, cudnn: bool = False, recorded: bool = False) -> Stepper:
        trial = Trial(self.work, number, recorded)
        if cudnn:
            trial.model.gru.takes_padded = lambda _: False  # type: ignore[method-assign]
        return lambda step: trial.step(self._at(step, [number])[0])

    def _stack(self, numbers: Sequence[int]) -> Stepper:
        stack = Stack([Trial(self.work, number) for number in numbers])
        return lambda step: stack.step(self._at(step, numbers))

    def _graph(self, numbers: Sequence[int]) -> Stepper:
        graph = Graph(Stack([Trial(self.work, number) for number in numbers]), self._at(0, numbers))
        return lambda step: graph.step(self._at(step, numbers))

    def measure(self, turns: int, steps: int, clock: Callable[[], float]) -> None:
        """Each way runs `steps` steps of its trials in each turn; the order rotates."""
        there = [way for way in self.rows if way.run is not None]
        for turn in range(turns):
            for way in there[turn % len(there) :] + there[: turn % len(there)]:
                self.work.synchronise()
                start = clock()
                way.run(steps)
                self.work.synchronise()
                way.rates.append(way.trials * steps / (clock() - start))

    def end(self) -> None:
        for _, processes in self.processes:
            processes.end()
        if self.mps:
            self.mps.end()


def line_of(way: Way, alone: Way, work: Work) -> str:
    sparsities = [MIX[number % len(MIX)][1] for number in range(way.trials)]
    spread = f"{min(sparsities):g}" if len(set(sparsities)) == 1 else f"{min(sparsities):g} to {max(sparsities):g}"
    cells = [parameters(work), spread, "element", way.name, str(way.trials)]
    if not way.rates:
        return " | ".join([*cells, f"unmeasured ({way.unmeasured})", "", "", "", ""])
    ratios = [one / other for one, other in zip(way.rates, alone.rates, strict=True)]
    return " | ".join(
        [
            *cells,
            f"{way.trials / statistics.median(way.rates) * 1e3:.1f}",
            f"{statistics.median(way.rates):.2f}",
            f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}",
            f"{1 - statistics.mean(sparsities):.3f}",
            f"{way.peak_bytes / 2**20:.0f} MiB" if way.peak_bytes else "unmeasured",
        ]
    )


def parameters(work: Work) -> str:
    with torch.device("meta"):
        model = ChiroDiff(Config(hidden=work.hidden, layers=work.layers))
    return f"{sum(weight.numel() for weight in model.parameters()):,}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxL", help="h x layers (default: the papers')")
    parser.add_argument(
        "--trials", nargs="+", type=int, default=[8, 16, 32] if HAS_GPU else [4], help="trials together"
    )
    parser.add_argument("--turns", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--steps", type=int, default=5 if HAS_GPU else 1, help="steps of each trial in a turn")
    parser.add_argument("--batch", type=int, default=128, help="sketches of each trial and step (default 128)")
    parser.add_argument(
        "--longest", type=int, default=LONGEST, help="points of a sketch at most; shorter in proportion"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default 1)")
    parser.add_argument("--device", default="cuda" if HAS_GPU else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a machine in use; no processes then")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--recorded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    works = [
        Work(*map(int, size.split("x")), batch=options.batch, longest=options.longest, device=options.device)
        for size in options.sizes
    ]
    if options.worker:
        serve(works[0], options.trials[0], options.recorded)
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s) a process"
    clock, timed = (time.process_time, "CPU time") if options.cpu_time else (time.perf_counter, "wall clock")
    print(f"torch {torch.__version__}, {name}; {options.turns} turns of {options.steps} step(s), {timed}\n")
    print(" | ".join(COLUMNS), flush=True)
    for work in works:
        table = Ways(work, options.trials, None if options.cpu_time else options.threads)
        try:
            table.measure(options.turns, options.steps, clock)
        finally:
            table.end()
        for way in table.rows:
            print(line_of(way, table.rows[0], work), flush=True)


if __name__ == "__main__":
    main()

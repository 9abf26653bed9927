"""Sampling on a GPU with zeros left out, end to end, beside the best dense path: bf16, compiled, CUDA graphs.

    python benchmarks/inference_gpu.py                        # 8 minutes at most, whatever the GPU
    python benchmarks/inference_gpu.py --model uvit --pictures 512

Needs PyTorch with triton, diffusers, safetensors, numpy and pydantic, and this checkout; no Ray, nothing installed.

One run is a whole DDIM sampling of U-ViT small/2 (44.3M parameters) or DDPM's U-Net (35.7M) at CIFAR-10's setting, with
random masks over its linear layers and convolutions of kernel 1 (S is of those; ERK, 2:4 uniform), or of ChiroDiff
(h = 96) with cuDNN's GRU. bf16 is channels_last. Each row takes turns with the compiled dense path, the one with
CUDA graphs; a ratio is of two runs of the same turn. The dense paths come first, then the zeros that ought to pay
most; what the time left is too short for, or what fails, is a row that says so. FLOPs are those of the weights. Peak
memory is of the row alone. The difference is from float32 with the same weights, of the largest value.

What it can be at most, by MACs: these layers are 93 % of U-ViT's, so 6.1 times faster at S = .9, 1.9 at .5. Of DDPM's
U-Net they are 10 %, of Latent Diffusion's 12: 1.10 and 1.12 times at S = .9. The rest are convolutions with a kernel.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine without Ray has no `pip install raysparse`

from benchmarks.inference_pictures import SCHEDULE, masked_model, pruned
from raysparse import plugins, rng
from raysparse.diffusion import ddim
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.metrics import flops
from raysparse.models import _cuda_products, chirodiff

MIB = 2**20
QUICK: dict[str, dict[str, Any]] = {
    "uvit": {"sample_size": 8, "embed_dim": 256, "depth": 2, "num_heads": 4},
    "ddpm_unet": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "attention_levels": (False, True),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
}
COLUMNS = (
    "model",
    "S",
    "pattern",
    "runtime",
    "ms a sample",
    "times faster than dense",
    "FLOPs",
    "peak MiB",
    "difference",
)


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Where the zeros of a row are."""

    sparsity: float
    pattern: str
    block: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """More of what the engine is told."""
        return {} if self.block is None else {"block": self.block}

    @property
    def cells(self) -> list[str]:
        named = {"nm": "2:4", "element": ""}.get(self.pattern, f"{self.pattern} {self.block or ''}".strip())
        return [f"{self.sparsity:g}", named]


DENSE = Zeros(0.0, "element")
ZEROS = (
    Zeros(0.5, "nm"),
    *(Zeros(0.9, "block", edge) for edge in (64, 32)),
    *(Zeros(0.95, "block", edge) for edge in (64, 32)),
)


class Half(nn.Module):
    """A copy of a model in bfloat16 and channels_last that takes and gives float32. On a CPU all is float32.

    There the benchmark is only tried, with Triton's interpreter, which cannot multiply bfloat16.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = copy.deepcopy(model).to(device, self.dtype, memory_format=torch.channels_last)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        found: Tensor = self.model(x.to(self.dtype, memory_format=torch.channels_last), timesteps).float()
        return found


class Bench:
    """One model's rows, whose time ends at time.perf_counter() = ends."""

    def __init__(self, options: argparse.Namespace, name: str, ends: float) -> None:
        self.options, self.name, self.ends = options, name, ends
        self.device = torch.device(options.device)
        self.schedule = NoiseSchedule(**SCHEDULE)  # type: ignore[arg-type]
        self.noise = torch.empty(0)
        self.cond: dict[str, Tensor] = {}
        self.base: Callable[..., Tensor] | None = None  # what all rows are compared with
        self.longest = 0.0  # seconds that a row took

    def row(self, cells: Sequence[str], make: Callable[[], tuple[Callable[..., Tensor], list[str]]]) -> None:
        """Print one. make: what samples, and its cells of FLOPs and difference; called only if there is time."""
        begun = time.perf_counter()
        start = f"| {self.name} | {' | '.join(cells)} | "
        if self.options.only and self.base is not None and not any(text in start for text in self.options.only):
            return
        if begun + self.longest > self.ends:
            print(f"{start}unmeasured: no time left |", flush=True)
            return
        held = self._allocated()
        try:
            network, (share, off) = make()
            times, ratios, peak = self._compare(network, held)
        except Exception as error:  # one row that cannot run ends no other
            print(f"{start}unmeasured: {type(error).__name__}: {' '.join(str(error).split())[:300]} |", flush=True)
            return
        self.longest = max(self.longest, time.perf_counter() - begun)
        ratio = f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}" if ratios else ""
        each = f"{statistics.median(times) / len(self.noise) * 1e3:.3f}"
        print(f"{start}{' | '.join([each, ratio, share, peak, off])} |", flush=True)

    def _compare(self, network: Callable[..., Tensor], held: int) -> tuple[list[float], list[float], str]:
        """Seconds, ratios to the base, peak memory."""
        if cuda := self.device.type == "cuda":
            self._seconds(network, 3)  # compiled at the first call, a CUDA graph is recorded at the second
            torch.cuda.reset_peak_memory_stats()
        self._seconds(network, 1)
        peak = f"{(torch.cuda.max_memory_allocated() - held) / MIB:.0f}" if cuda else "unmeasured"
        times, ratios = [], []
        for _ in range(self.options.turns):
            dense = self._seconds(self.base, self.options.ddim_steps) if self.base is not None else None
            times.append(self._seconds(network, self.options.ddim_steps))
            ratios += [] if dense is None else [dense / times[-1]]
        return times, ratios, peak

    def _seconds(self, network: Callable[..., Tensor], steps: int) -> float:
        self._wait()
        begun = time.perf_counter()
        ddim.sample(network, self.schedule, self.noise, steps=steps, cond=self.cond)
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0


def pictures(options: argparse.Namespace, name: str, ends: float) -> None:
    """The rows of one model of pictures."""
    bench, settings = Bench(options, name, ends), QUICK[name] if options.quick else {}
    module = plugins.load("models", name)
    with torch.device("meta"):
        empty = module.build(module.Config(**settings), seed=0)
        macs = flops.forward_macs(empty, module.example(empty.config, 1, 1, "meta"), 1)
    kernels = with_kernel(empty)
    size = empty.config.sample_size
    noise = torch.randn(options.pictures, 3, size, size, generator=rng.generator(0, "pictures benchmark noise"))
    bench.noise = noise.to(bench.device)

    @functools.lru_cache(maxsize=1)
    def model_of(zeros: Zeros) -> tuple[nn.Module, dict[str, Tensor]]:
        """On the CPU, so that the GPU holds what is measured alone."""
        return masked_model(name, settings, zeros.sparsity, zeros.pattern, keep_dense=kernels, **zeros.settings)

    def row(zeros: Zeros, runtime: str, run: Callable[[nn.Module, dict[str, Tensor]], Callable[..., Tensor]]) -> None:
        def made() -> tuple[Callable[..., Tensor], list[str]]:
            model, masks = model_of(zeros)
            network = run(model, masks)
            given = bench.noise, torch.full((len(noise),), 500, device=bench.device)
            want, got = copy.deepcopy(model).to(bench.device)(*given), network(*given)
            share = flops.forward_flops(macs, {key: float(mask.float().mean()) for key, mask in masks.items()})
            off = float((got - want).abs().max() / want.abs().max())
            return network, [f"{share / flops.forward_flops(macs):.3f}", f"{off:.0e}"]

        bench.row([*zeros.cells, runtime], made)

    def remembered(model: nn.Module, masks: dict[str, Tensor]) -> Callable[..., Tensor]:
        bench.base = compiled(Half(model, bench.device))
        return bench.base

    row(DENSE, "dense, bf16, compiled, CUDA graphs", remembered)
    row(DENSE, "dense, bf16, compiled", lambda model, _: compiled(Half(model, bench.device), graphs=False))
    row(DENSE, "dense, float32", lambda model, _: copy.deepcopy(model).to(bench.device))
    for zeros in options.zeros:
        row(zeros, "sparse", lambda model, _: compiled(sparse(model, bench.device)))
    for zeros in options.zeros:
        row(zeros, "sparse, not compiled", lambda model, _: sparse(model, bench.device))
    row(options.zeros[-1], "torch.nn.utils.prune", lambda *given: Half(pruned(name, settings, *given), bench.device))


def with_kernel(model: nn.Module) -> list[str]:
    """The convolutions that no pattern is for: they stay dense, so that S is of what can save time."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return [name for name, layer in layers.items() if layer.kernel_size != (1, 1)]


def sparse(model: nn.Module, device: torch.device) -> nn.Module:
    half = Half(model, device)
    half.model = _cuda_products.with_sparse_products(half.model)
    return half


def compiled(network: nn.Module, graphs: bool = True) -> Callable[..., Tensor]:
    """On a CPU, where the benchmark is only tried, the network itself."""
    if next(network.parameters()).device.type != "cuda":
        return network
    return torch.compile(network, mode="reduce-overhead" if graphs else "default")


def sketches(options: argparse.Namespace, ends: float) -> None:
    """ChiroDiff with cuDNN's GRU, and with ours; both as the sampler calls them, and ours under autocast."""
    bench = Bench(options, "chirodiff", ends)
    draw = rng.generator(0, "inference benchmark lengths")
    lengths = (88.6 + 17.4 * torch.randn(options.sketches, generator=draw)).round().long().clamp(20, 165)
    noise = torch.randn(len(lengths), int(lengths.max()), 3, generator=rng.generator(0, "inference benchmark noise"))
    bench.noise, bench.cond = noise.to(bench.device), {"lengths": lengths}  # the host's: cuDNN's packing needs them
    config = chirodiff.Config(hidden=8, layers=1) if options.quick else chirodiff.Config()
    ours = chirodiff.build(config, seed=0).to(bench.device).eval().requires_grad_(False)
    theirs = copy.deepcopy(ours)
    theirs.gru = Cudnn(theirs.gru)  # type: ignore[assignment]

    def cells(network: nn.Module) -> list[str]:
        given = {"x": bench.noise, "timesteps": torch.full((len(noise),), 500, device=bench.device), **bench.cond}
        want = theirs(**given)
        return ["1.000", f"{float((network(**given) - want).abs().max() / want.abs().max()):.0e}"]

    bench.row(["0", "", "torch.nn.GRU"], lambda: (theirs, cells(theirs)))
    bench.base = theirs
    bench.row(["0", "", "ours"], lambda: (ours, cells(ours)))
    half = Autocast(ours)
    bench.row(["0", "", "ours, bf16"], lambda: (half, cells(half)))


class Autocast(nn.Module):
    """A model in bfloat16, on a GPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor, **cond: Tensor) -> Tensor:
        x = next(iter((*given, *cond.values())))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            found: Tensor = self.model(*given, **cond)
            return found


class Cudnn(nn.GRU):
    """nn.GRU with the weights of ours, without its last states."""

    def __init__(self, ours: nn.GRU) -> None:
        super().__init__(ours.input_size, ours.hidden_size, ours.num_layers, bidirectional=True)
        self.load_state_dict(ours.state_dict())
        self.to(next(ours.parameters()).device).requires_grad_(False)

    def forward(self, packed: Any) -> Any:  # type: ignore[override]
        return super().forward(packed)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", nargs="+", default=["chirodiff", "uvit", "ddpm_unet"])
    parser.add_argument("--pictures", type=int, default=128, help="drawn at a time (default 128)")
    parser.add_argument("--sketches", type=int, default=512, help="drawn at a time (default 512)")
    parser.add_argument("--ddim-steps", type=int, default=20, help="(default 20; time is proportional)")
    parser.add_argument("--turns", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--seconds", type=float, default=420, help="a row that would end later is left out (420)")
    parser.add_argument("--only", nargs="+", help="beside the base only the rows that hold one of these texts")
    parser.add_argument("--quick", action="store_true", help="the smallest models, once: does it run?")
    options = parser.parse_args(arguments)
    options.zeros = ZEROS
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick tries the benchmark, which measures nothing on a CPU")
    if options.quick:
        options.pictures, options.sketches, options.ddim_steps, options.turns = 1, 4, 1, 1
        options.zeros = (Zeros(0.5, "nm"), Zeros(0.9, "block", 64))
    torch._dynamo.config.recompile_limit = 1000  # every row's model is another one of the same code
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device}, {options.pictures} pictures, {options.ddim_steps} DDIM steps\n")
    if options.device == "cpu":
        print("Only tried, on a CPU: all in float32, nothing compiled; the times say nothing of a GPU.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    begun = time.perf_counter()
    with torch.no_grad():
        for index, name in enumerate(options.model):  # models share what time is left
            now = time.perf_counter()
            ends = now + (begun + options.seconds - now) / (len(options.model) - index)
            if name == "chirodiff":
                sketches(options, ends)
            else:
                pictures(options, name, ends)


if __name__ == "__main__":
    main()

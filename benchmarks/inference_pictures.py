"""Sampling pictures with sparse weights: what skipping the zeros saves, end to end, beside the dense path.

One run is a whole DDIM sampling of U-ViT small/2 (44.3M parameters) or of DDPM's U-Net (35.7M), both at CIFAR-10's
setting, with ERK masks over random weights. The runtimes take turns on the same noise in one process; a ratio is of two
runs of the same turn. Peak memory is what a runtime's weights and its first prediction take.

    python benchmarks/inference_pictures.py             # 8 pictures, 2 DDIM steps, one thread: 6 minutes
    python benchmarks/inference_pictures.py --model ddpm_unet --pattern element --sparsity .9

Runtimes: `dense` is PyTorch (oneDNN and MKL), `sparse` what `--runtime sparse` samples with. The column of the layers
is of the sums of seconds in the layers that are sparse, alone, on inputs of the sizes that they get. For a GPU:
inference_gpu.py.
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

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other file; a script has only its own folder

from benchmarks.peak_memory import made
from raysparse import plugins, rng
from raysparse.diffusion import ddim
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.models._sparse_products import SparseProduct
from raysparse.sparse import SparseEngine

QUICK: dict[str, dict[str, Any]] = {
    "uvit": {"embed_dim": 128, "depth": 2, "num_heads": 4},
    "ddpm_unet": {
        "block_out_channels": (64, 64),
        "attention_levels": (False, True),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
}
SCHEDULE = {"timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}


def masked_model(
    name: str, options: dict[str, Any], sparsity: float, pattern: str, **settings: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """With weights drawn everywhere, and the masks. settings: more of the engine's."""
    module = plugins.load("models", name)
    model: nn.Module = module.build(module.Config(**options), seed=0)
    draw = rng.generator(0, "pictures benchmark weights")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():  # what starts at zero would be skipped whole
                weight.normal_(std=0.02, generator=draw)
    optimizer = torch.optim.SGD(model.parameters())
    settings = {"allocation": "erk", "pattern": pattern} | settings
    engine = SparseEngine(model, optimizer, method="static", sparsity=sparsity, **settings)
    return model.eval().requires_grad_(False), engine.masks


def pruned(name: str, options: dict[str, Any], model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """torch.nn.utils.prune: a hook multiplies with the mask before each forward pass."""
    module = plugins.load("models", name)
    found: nn.Module = module.build(module.Config(**options), seed=0).eval().requires_grad_(False)
    found.load_state_dict(model.state_dict())
    for weight, mask in masks.items():
        owner, _, last = weight.rpartition(".")
        prune.custom_from_mask(found.get_submodule(owner), last, mask)
    return found


class InFloat32(nn.Module):
    """A model outside autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Any, **cond: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            found: Tensor = self.model(*given, **cond)
            return found


def layer_ratio(network: nn.Module, once: Callable[[], Any], turns: int) -> str:
    """Seconds of the sparse layers' dense selves over theirs, on the inputs of one pass: min / median / max."""
    seen: list[tuple[SparseProduct, Tensor]] = []
    layers = [module for module in network.modules() if isinstance(module, SparseProduct)]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: seen.append((layer, given[0]))) for layer in layers]
    once()
    if not seen:
        return "none is sparse"
    for hook in hooks:
        hook.remove()
    ratios = []
    for turn in range(turns + 1):
        begun = time.perf_counter()
        for layer, x in seen:
            layer(x)
        between = time.perf_counter()
        for layer, x in seen:
            layer.layer(x)
        if turn:
            ratios.append((time.perf_counter() - between) / (between - begun))
    return f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}"


def measure(options: argparse.Namespace, name: str, sparsity: float, pattern: str) -> None:
    """Print the rows of one model, sparsity and pattern."""
    settings = QUICK[name] if options.quick else {}
    try:
        model, masks = masked_model(name, settings, sparsity, pattern)
    except UsageError as error:
        print(f"| {name} | {sparsity:g} | {pattern} | not measured: {error} |")
        return
    size, channels = model.config.sample_size, model.config.in_channels  # type: ignore[union-attr]
    noise = torch.randn(options.pictures, channels, size, size, generator=rng.generator(0, "pictures benchmark noise"))
    schedule = NoiseSchedule(**SCHEDULE)  # type: ignore[arg-type]
    half = torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: copy.deepcopy(model),
        "sparse": lambda: plugins.load("models", name).sparse_runtime(model),
    }
    if options.bf16:
        makers["dense, fp32"] = lambda: InFloat32(copy.deepcopy(model))
    if options.peers:
        makers["torch.nn.utils.prune"] = lambda: pruned(name, settings, model, masks)
    results: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {runtime: [] for runtime in makers}

    def draw(network: nn.Module, steps: int) -> Tensor:
        return ddim.sample(network, schedule, noise, steps=steps)

    with torch.inference_mode(), half:  # kernels compete with dense products in its type
        networks, memory = made(makers, lambda network: draw(network, 1))
        for _ in range(options.turns):
            for runtime, network in networks.items():
                begun = time.perf_counter()
                results[runtime] = draw(network, options.ddim_steps)
                seconds[runtime].append(time.perf_counter() - begun)
        layers = layer_ratio(networks["sparse"], lambda: draw(networks["sparse"], 1), options.turns)
    active = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    for runtime, times in seconds.items():
        off = float((results[runtime] - results["dense"]).abs().max() / results["dense"].abs().max())
        ratios = [one / mine for one, mine in zip(seconds["dense"], times, strict=True)]
        row = [name, f"{sparsity:g}", pattern, runtime, f"{statistics.median(times) / len(noise) * 1e3:.0f}"]
        row.append(f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
        row += [layers if runtime == "sparse" else "", f"{active:.3f}", memory[runtime], f"{off:.0e}"]
        print(f"| {' | '.join(row)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["uvit", "ddpm_unet"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--pattern", nargs="+", default=["element", "block", "diagonal"])
    parser.add_argument("--pictures", type=int, default=8, help="drawn at a time (default 8)")
    parser.add_argument("--ddim-steps", type=int, default=2, help="(default 2; time is proportional)")
    parser.add_argument("--turns", type=int, default=3, help="measured turns (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--bf16", action="store_true", help="under autocast, as `train.precision: bf16`; else float32")
    parser.add_argument("--peers", action="store_true", help="torch.nn.utils.prune beside it")
    parser.add_argument("--quick", action="store_true", help="the smallest models, once: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sparsity, options.pictures, options.turns, options.peers = [0.9], 2, 1, True
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s), "
        f"{'bf16' if options.bf16 else 'fp32'}, {options.pictures} pictures, {options.ddim_steps} DDIM steps\n\n"
        "| model | S | pattern | runtime | ms a picture | times faster than dense | its sparse layers alone "
        "| weights left | peak MiB | difference, of the largest value |\n|" + "---|" * 10
    )
    for name in options.model:
        for pattern in options.pattern:
            for sparsity in options.sparsity:
                measure(options, name, sparsity, pattern)


if __name__ == "__main__":
    main()

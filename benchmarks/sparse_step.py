"""What sparsity costs per training step and per topology update, beside torch.nn.utils.prune and rigl-torch.

    python benchmarks/sparse_step.py [--batch 4] [--rounds 9] [--updates 5] [--threads 2] [--device cpu]

One run, on the 35.7M-parameter DDPM CIFAR-10 U-Net, AdamW, gradients clipped. All variants take turns, one step
each per round, in an order that rotates; a ratio is that round's time over the dense step of the same round. Then mask
updates alone. rigl-torch comes with `pip install -e '.[bench]'`; without it the others are measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import nn
from torch.nn.utils import prune

from raysparse.sparse import SparseEngine
from raysparse.sparse.masks import maskable

SPARSITY = 0.9
PARAMETERS = 35_746_307
Step = Callable[[], None]


def unet() -> nn.Module:
    """diffusers' google/ddpm-cifar10-32."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None,
        norm_num_groups=32,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS
    return model


class Trainer:
    """A model, its optimizer, and one training step with places for what a library adds."""

    def __init__(self, model: nn.Module, batch: int, device: str) -> None:
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
        self.t = torch.randint(0, 1000, (batch,), generator=generator).to(device)

    def step(self, after_backward: Step | None = None, take: Callable[[], bool] | None = None) -> None:
        """take: whether the optimizer steps; None: always."""
        self.optimizer.zero_grad()
        (self.model(self.x, self.t).sample - self.x).square().mean().backward()
        if after_backward:
            after_backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if take is None or take():
            self.optimizer.step()


def ours(trainer: Trainer, method: str, interval: int, sparsity: float = SPARSITY) -> tuple[Step, SparseEngine]:
    dynamic = {} if method == "static" else {"update_interval": interval, "prune_ratio": 0.5}
    engine = SparseEngine(trainer.model, trainer.optimizer, method=method, sparsity=sparsity, **dynamic)

    def step() -> None:
        trainer.step(engine.mask_gradients)
        engine.after_step()

    return step, engine


def torch_prune(trainer: Trainer) -> Step:
    for name in maskable(trainer.model):
        module = trainer.model.get_submodule(name.removesuffix(".weight"))
        prune.random_unstructured(module, "weight", amount=SPARSITY)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-4, fused=True)
    return trainer.step


def rigl_torch(trainer: Trainer, interval: int):
    """Its scheduler, told to mask linear layers too; it allocates uniformly, which is the only thing it can."""
    from rigl_torch.RigL import RigLScheduler

    scheduler = RigLScheduler(
        trainer.model,
        trainer.optimizer,
        dense_allocation=1 - SPARSITY,
        T_end=10**9,
        delta=interval,
        alpha=0.5,
        ignore_linear_layers=False,
    )
    return (lambda: trainer.step(take=scheduler)), scheduler


def seconds(function: Step, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(numbers: list[float], unit: str = "") -> str:
    return f"{min(numbers):6.3f} {statistics.median(numbers):6.3f} {max(numbers):6.3f}{unit}"


def measure_steps(model: nn.Module, arguments: argparse.Namespace, with_rigl_torch: bool) -> None:
    def trainer() -> Trainer:
        return Trainer(copy.deepcopy(model), arguments.batch, arguments.device)

    never = 10**6
    steps = {"dense": trainer().step, "raysparse static": ours(trainer(), "static", never)[0]}
    steps["raysparse rigl"] = ours(trainer(), "rigl", never)[0]
    steps["torch.nn.utils.prune"] = torch_prune(trainer())
    if with_rigl_torch:
        steps["rigl-torch"], scheduler = rigl_torch(trainer(), never)
        norms = sum(weight.ndim < 2 and share > 0 for weight, share in zip(scheduler.W, scheduler.S, strict=True))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for step in steps.values():
        step()  # the first makes optimizer state and picks kernels
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(steps[name], arguments.device))
    print(f"\ntraining step, batch {arguments.batch}, sparsity {SPARSITY}, {arguments.rounds} rounds (min median max)")
    print(f"{'':24}{'seconds':^22}   {'x dense, same round':^22}")
    for name in names:
        ratios = [mine / dense for mine, dense in zip(times[name], times["dense"], strict=True)]
        print(f"{name:24}{spread(times[name])}   {spread(ratios)}")
    if with_rigl_torch:
        print(f"(rigl-torch also masks the scales of {norms} norm layers, raysparse none)")


def measure_updates(model: nn.Module, arguments: argparse.Namespace, with_rigl_torch: bool) -> None:
    print(f"\ntopology update of {PARAMETERS:,} parameters, prune_ratio .5, seconds (min median max)")
    for method in ("rigl", "magran"):
        for sparsity in (0.5, 0.9):
            trainer = Trainer(copy.deepcopy(model), 1, arguments.device)
            step, engine = ours(trainer, method, 2, sparsity)
            times = []
            for _ in range(arguments.updates):
                step()
                trainer.step(engine.mask_gradients)
                times.append(seconds(engine.after_step, arguments.device))
            assert engine.updates == arguments.updates
            print(f"{f'raysparse {method}, S {sparsity}':24}{spread(times)}")
    if with_rigl_torch:
        trainer = Trainer(copy.deepcopy(model), 1, arguments.device)
        step, scheduler = rigl_torch(trainer, 2)
        times = []
        for _ in range(arguments.updates):
            step()
            trainer.step(take=lambda: False)
            for hook in scheduler.backward_hook_objects:  # it cannot take gradients in another memory order
                if hook is not None and hook.dense_grad is not None:
                    hook.dense_grad = hook.dense_grad.contiguous()
            times.append(seconds(scheduler, arguments.device))
        assert scheduler.rigl_steps == arguments.updates
        print(f"{f'rigl-torch, S {SPARSITY}':24}{spread(times)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9, help="0: no steps")
    parser.add_argument("--updates", type=int, default=5, help="0: no updates")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with_rigl_torch = importlib.util.find_spec("rigl_torch") is not None
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads")
    if not with_rigl_torch:
        print("rigl-torch is not installed and left out: pip install -e '.[bench]'")
    model = unet()
    if arguments.updates:
        measure_updates(model, arguments, with_rigl_torch)
    if arguments.rounds:
        measure_steps(model, arguments, with_rigl_torch)


if __name__ == "__main__":
    main()

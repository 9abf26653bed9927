"""A training step of Latent Diffusion on latents from the cache, beside one that encodes its pictures first.

    python benchmarks/latent_cache.py                     # both networks at a quarter of their width, on a CPU
    python benchmarks/latent_cache.py --full              # VQ-f4 and the 274M U-Net at 256 px, batch 12, for a GPU
    python benchmarks/latent_cache.py --full --batch 1    # the same on a CPU, in about three minutes

Both steps end in the same training step of the U-Net (noise prediction, loss, backward, AdamW). "online" encodes a
batch of pictures that lie in memory already, uint8; reading and cropping them, which would be added, is left out.
"cached" gathers float16 latents from an Arrow file mapped into memory, as trials do. The two take turns; a ratio is of
two steps of the same round. GMACs are counted from traced forward passes, one example, 3 passes for training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysparse import rng
from raysparse.data import table
from raysparse.metrics import flops
from raysparse.models import autoencoder, latent_unet

QUARTER_UNET: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (56, 112, 168, 224),
    "attention_head_dim": 28,
    "norm_num_groups": 8,
}
QUARTER_ENCODER: dict[str, Any] = {"block_out_channels": (32, 64, 128)}
LATENTS = 2000  # in the Arrow file; at full size 49 MB
EPOCHS = 150  # the paper's


class Encode(nn.Module):
    """The autoencoder with `encode` as its forward pass, to be traced."""

    def __init__(self, model: autoencoder.Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode(x)


def gmacs(unet: latent_unet.Config, encoder: autoencoder.Config) -> tuple[float, float]:
    """Of one example: the encoder's forward pass, and the U-Net's training step (3 forward passes)."""
    with torch.device("meta"):
        network, first_stage = latent_unet.build(unet, seed=0), Encode(autoencoder.build(encoder, seed=0))
        picture = torch.empty(1, 3, unet.sample_size * encoder.factor, unet.sample_size * encoder.factor)
    encoding = sum(flops.forward_macs(first_stage, {"x": picture}, batch=1).values())
    forward = sum(flops.forward_macs(network, latent_unet.example(unet, 1, 1, "meta"), batch=1).values())
    return encoding / 1e9, 3 * forward / 1e9


class Steps:
    """The two training steps, on one U-Net and one optimizer."""

    def __init__(self, unet: latent_unet.Config, encoder: autoencoder.Config, args: Any, folder: Path) -> None:
        self.device = torch.device(args.device)
        self.bf16, self.batch = args.bf16, args.batch
        self.model = latent_unet.build(unet, seed=0).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2.4e-5, weight_decay=1e-2, fused=True)
        self.encoder = autoencoder.build(encoder, seed=0).to(self.device)
        draw = np.random.default_rng(0)
        side = unet.sample_size * encoder.factor
        self.pictures = torch.from_numpy(draw.integers(0, 256, (args.batch, 3, side, side), dtype=np.uint8))
        shape = (LATENTS, unet.in_channels, unet.sample_size, unet.sample_size)
        table.write_parquet(
            folder / "shard", {"latent": draw.standard_normal(shape, np.float32).astype(np.float16)}, {}
        )
        table.write_arrow(folder / "latents.arrow", [folder / "shard"])
        self.table = table.Table(folder / "latents.arrow")
        self.turn = 0

    def online(self) -> None:
        self.train(self.encode())

    def cached(self) -> None:
        self.train(self.gather())

    @torch.no_grad()
    def encode(self) -> Tensor:
        with self._autocast():
            return self.encoder.encode(self.pictures.to(self.device).float().div_(127.5).sub_(1)).float()

    def gather(self) -> Tensor:
        self.turn += 1
        rows = rng.numpy_generator(0, "latent_cache", step=self.turn).integers(0, LATENTS, self.batch)
        return torch.from_numpy(self.table.gather("latent", rows)).to(self.device).float()

    def train(self, x: Tensor) -> None:
        draw = rng.generator(0, "latent_cache", step=self.turn)
        eps = torch.randn(x.shape, generator=draw).to(self.device)
        timesteps = torch.randint(0, 1000, (len(x),), generator=draw).to(self.device)
        with self._autocast():
            loss = (self.model(x + eps, timesteps) - eps).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, function: Callable[[], Any]) -> float:
        self._synchronise()
        start = time.perf_counter()
        function()
        self._synchronise()
        return time.perf_counter() - start

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(steps: Steps, rounds: int) -> dict[str, list[float]]:
    """Seconds by name; the order rotates from round to round."""
    functions = {"online": steps.online, "cached": steps.cached, "encode": steps.encode, "gather": steps.gather}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for name in names:
        functions[name]()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(steps.seconds(functions[name]))
    return taken


def spread(numbers: Sequence[float]) -> tuple[float, float, float]:
    return min(numbers), statistics.median(numbers), max(numbers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="a quarter of the width, 128 px (the default)")
    size.add_argument("--full", action="store_true", help="the paper's networks at 256 px")
    size.add_argument("--quick", action="store_true", help="tiny networks, two rounds: does it run?")
    parser.add_argument("--batch", type=int, help="pictures per step (default 12; --quick: 2)")
    parser.add_argument("--rounds", type=int, help="measured rounds (default 7; --full: 5; --quick: 2)")
    parser.add_argument("--bf16", action="store_true", help="autocast, of the encoder too")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args = parser.parse_args(arguments)
    args.batch = args.batch or (2 if args.quick else 12)
    torch.set_num_threads(args.threads)
    options = ({}, {}) if args.full else (QUARTER_UNET, QUARTER_ENCODER)
    if args.quick:
        options = (latent_unet.SMALL, autoencoder.SMALL)
    unet, encoder = latent_unet.Config(**options[0]), autoencoder.Config(**options[1])
    encoding, training = gmacs(unet, encoder)
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(unet, encoder, args, Path(folder))
        taken = measure(steps, args.rounds or (5 if args.full else 2 if args.quick else 7))
    ratio = spread([online / cached for online, cached in zip(taken["online"], taken["cached"], strict=True)])
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"cpu, {args.threads} threads"
    found = {
        "torch": torch.__version__,
        "device": device,
        "batch": args.batch,
        "precision": "bf16" if args.bf16 else "fp32",
        "parameters": {
            "unet": sum(weight.numel() for weight in steps.model.parameters()),
            "autoencoder": sum(weight.numel() for weight in steps.encoder.parameters()),
        },
        "gmacs": {"encode": encoding, "train": training, "ratio": (encoding + training) / training},
        "seconds": {name: spread(times) for name, times in taken.items()},
        "ratio": ratio,
    }
    print(json.dumps(found)) if args.json else show(found)


def show(found: dict[str, Any]) -> None:
    counts = found["parameters"]
    print(f"torch {found['torch']}, {found['device']}, {found['precision']}, batch {found['batch']}")
    print(f"U-Net {counts['unet']:,} parameters, autoencoder {counts['autoencoder']:,}\n")
    print(f"{'':34}{'seconds (min median max)':^27}{'GMACs an example':>18}")
    macs = found["gmacs"]
    rows = (
        ("step with online encoding", "online", macs["encode"] + macs["train"]),
        ("step on cached latents", "cached", macs["train"]),
        ("  encoding a batch", "encode", macs["encode"]),
        ("  gathering a batch of latents", "gather", 0.0),
    )
    for title, name, count in rows:
        low, middle, high = found["seconds"][name]
        print(f"{title:34}{low:9.4f}{middle:9.4f}{high:9.4f}{count:18.2f}")
    low, middle, high = found["ratio"]
    print(f"\nonline / cached, same round: {middle:.3f} (min {low:.3f}, max {high:.3f}); by GMACs {macs['ratio']:.3f}")
    print(f"over {EPOCHS} epochs: each picture is encoded {EPOCHS} times online, once for the cache (twice with flips)")


if __name__ == "__main__":
    main()

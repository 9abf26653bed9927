"""Single products on a GPU: layers of a transformer with zeros in a pattern, in sampling and in training, beside dense.

    python benchmarks/products_gpu.py                  # U-ViT small/2's and twice their width, a minute or two
    python benchmarks/products_gpu.py --tokens 4160 --shapes 512x1536

Needs PyTorch with triton, diffusers, safetensors, numpy and pydantic, and this checkout; no Ray, nothing installed.

bfloat16, random masks, each row whether its pattern pays or not: by such figures `_cuda_products` decides which layers
leave their zeros out. A training row is the sum of forward, dL/dx and dL/dW. On a GPU each is replayed from a CUDA
graph, so that no time to start kernels is in it; dense and sparse take turns, a ratio is of one turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a machine without Ray has no `pip install raysparse`

from raysparse import rng
from raysparse.models import _cuda_products as products

Calls = list[Callable[[], object]]
COLUMNS = ("inputs x outputs", "pattern", "left", "what", "ms", "times as fast as dense (min / median / max)")
SHAPES = ("512x1536", "512x512", "512x2048", "2048x512", "1024x4096", "4096x1024")  # qkv, proj, fc1, fc2, and wider
BLOCKS = ((64, (0.05, 0.1, 0.25, 0.35)), (32, (0.05, 0.1)), (16, (0.05,)))  # edges, shares that are left


def block_mask(inputs: int, outputs: int, edge: int, left: float, draw: torch.Generator) -> Tensor:
    """bool [outputs, inputs]: so many blocks, one at least."""
    rows, columns = outputs // edge, inputs // edge
    used = torch.zeros(rows * columns, dtype=torch.bool)
    used[torch.randperm(len(used), generator=draw)[: max(1, round(left * len(used)))]] = True
    return used.view(rows, columns).repeat_interleave(edge, 0).repeat_interleave(edge, 1)


def two_of_four_mask(inputs: int, outputs: int, draw: torch.Generator) -> Tensor:
    return (torch.rand(outputs, inputs // 4, 4, generator=draw).argsort(-1) < 2).view(outputs, inputs)


def trained(layer: nn.Linear, edge: int, x: Tensor, dy: Tensor) -> Calls:
    """Forward, dL/dx and dL/dW by blocks."""
    kernels, weight, bias = products.kernels(), layer.weight, layer.bias
    used = products.blocks(weight, edge)
    rows, columns = (places.contiguous() for places in used.nonzero().int().unbind(1))
    blocks = kernels.Blocks(columns, products.starts(used.sum(1)), edge)
    turned = kernels.Blocks(used.T.nonzero()[:, 1].int(), products.starts(used.sum(0)), edge)
    return [
        lambda: kernels.block_of_weight(x, weight, blocks, bias, turned=False, tf32=False),
        lambda: kernels.block_of_weight(dy, weight, turned, None, turned=True, tf32=False),
        lambda: kernels.block_gradient(x, dy, rows, blocks, False),
    ]


class Timed:
    """Calls that are timed one after the other; on a GPU from a CUDA graph of several rounds."""

    def __init__(self, calls: Calls, options: argparse.Namespace) -> None:
        self.calls, self.repeats, self.graph = calls, options.repeats, None
        self._round()  # compiles kernels
        if options.device == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._rounds()

    def seconds(self) -> float:
        """Of a round, the mean."""
        if self.graph is None:
            begun = time.perf_counter()
            self._rounds()
        else:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            self.graph.replay()
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / self.repeats

    def _rounds(self) -> None:
        for _ in range(self.repeats):
            self._round()

    def _round(self) -> None:
        for call in self.calls:
            call()


class Table:
    """The rows of one layer's size."""

    def __init__(self, inputs: int, outputs: int, options: argparse.Namespace) -> None:
        self.inputs, self.outputs, self.options = inputs, outputs, options
        self.draw = rng.generator(0, f"products benchmark {inputs} {outputs}")
        x, dy = (
            torch.randn(options.tokens, side, generator=self.draw).to(options.device, options.dtype)
            for side in (inputs, outputs)
        )
        self.x, self.dy = x, dy
        layer = self.layer(torch.ones(outputs, inputs))
        forward: Calls = [lambda: layer(x)]
        backward: Calls = [lambda: dy @ layer.weight, lambda: dy.T @ x]
        self.dense = {"sampling": Timed(forward, options), "training": Timed([*forward, *backward], options)}

    def rows(self) -> None:
        for edge, shares in BLOCKS:
            for left in shares if not (self.inputs % edge or self.outputs % edge) else ():
                layer = self.layer(block_mask(self.inputs, self.outputs, edge, left, self.draw))
                self.block_rows(layer, edge, left)
        layer = self.layer(two_of_four_mask(self.inputs, self.outputs, self.draw))
        self.row("2:4", 0.5, "sampling", lambda: self.sampled(products.TwoOfFourProduct(layer)))

    def block_rows(self, layer: nn.Linear, edge: int, left: float) -> None:
        self.row(f"block {edge}", left, "sampling", lambda: self.sampled(products.BlockProduct(layer, edge)))
        self.row(f"block {edge}", left, "training", lambda: trained(layer, edge, self.x, self.dy))

    def layer(self, mask: Tensor) -> nn.Linear:
        layer = nn.Linear(self.inputs, self.outputs).requires_grad_(False)
        layer.weight.mul_(mask)
        return layer.to(self.options.device, self.options.dtype)

    def sampled(self, product: nn.Module) -> Calls:
        return [lambda: product(self.x)]

    def row(self, pattern: str, left: float, what: str, make: Callable[[], Calls]) -> None:
        start = f"| {self.inputs} x {self.outputs} | {pattern} | {left:g} | {what} | "
        try:
            mine, dense = Timed(make(), self.options), self.dense[what]
            pairs = [(mine.seconds(), dense.seconds()) for _ in range(self.options.turns)]
        except Exception as error:  # one row that cannot run ends no other
            why = " ".join(str(error).split())[:200]
            print(f"{start}unmeasured: {type(error).__name__}: {why} |", flush=True)
            return
        ratios = sorted(other / own for own, other in pairs)
        each = statistics.median(own for own, _ in pairs) * 1e3
        spread = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        print(f"{start}{each:.4f} | {spread} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=128 * 257, help="(default 32,896: 128 pictures of U-ViT small/2)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INPUTSxOUTPUTS")
    parser.add_argument("--repeats", type=int, default=20, help="rounds in a turn (default 20)")
    parser.add_argument("--turns", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--quick", action="store_true", help="a small layer, once: does it run?")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick tries the benchmark, which measures nothing on a CPU")
    if options.quick:
        options.tokens, options.shapes, options.repeats, options.turns = 40, ["256x128"], 1, 1
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32  # which the interpreter can multiply
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, interpreted: the times say nothing"
    print(f"torch {torch.__version__}, {device}; {options.tokens} tokens, {options.turns} turns of {options.repeats}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with torch.no_grad():
        for shape in options.shapes:
            Table(*map(int, shape.split("x")), options).rows()


if __name__ == "__main__":
    main()

"""A training step of ChiroDiff on a CPU: the packed GRU and the kernels beside nn.GRU on padded and on packed input.

A step is noise prediction, loss, backward and AdamW on a batch of 128 sketches as long as KanjiVG's (mean 88.6 points,
99 % below 129, at most 165). The kernels (`train.runtime: auto` takes them; C++, all weights active here) are left out
where no compiler is. All take turns on the same batches with the same weights; a ratio is of two steps
of the same turn, and the first turn, which warms up, is left out. The first turn's loss and gradients are compared with
nn.GRU's on packed input; on padded input its reverse direction reads the padding first, which is another function.

    python benchmarks/chirodiff_step.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from raysparse import rng
from raysparse.diffusion.losses import eps_mse
from raysparse.errors import UsageError
from raysparse.models.chirodiff import ChiroDiff, Config, build, sparse_step

SIZES = ((128, 3), (96, 3), (48, 2))  # h, layers: QuickDraw, KanjiVG, VMNIST
OURS, KERNELS, EQUAL = "packed GRU", "kernels", "nn.GRU packed"

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x, timesteps, lengths, eps


class TorchGRU(nn.GRU):
    """nn.GRU where ChiroDiff expects the packed GRU, on packed input or on the padded tensor that it came from."""

    padded = False

    def forward(self, packed: PackedSequence) -> PackedSequence:  # type: ignore[override]
        if not self.padded:
            return super().forward(packed)[0]
        x, lengths = pad_packed_sequence(packed, batch_first=True)
        return pack_padded_sequence(super().forward(x)[0], lengths, batch_first=True)


class PaddedGRU(TorchGRU):
    padded = True


KINDS: dict[str, type[TorchGRU] | None] = {"nn.GRU padded": PaddedGRU, EQUAL: TorchGRU, OURS: None, KERNELS: None}


def model_of(kind: type[TorchGRU] | None, hidden: int, layers: int) -> ChiroDiff:
    """The same weights whatever the kind."""
    model = build(Config(hidden=hidden, layers=layers), seed=0)
    if kind is not None:
        gru = kind(model.gru.input_size, hidden, layers, bidirectional=True, batch_first=kind.padded)
        gru.load_state_dict(model.gru.state_dict())
        model.gru = gru  # type: ignore[assignment]
    return model


def batch_of(turn: int, size: int) -> Batch:
    draw = rng.generator(0, "chirodiff_step", step=turn)
    lengths = (88.6 + 17.4 * torch.randn(size, generator=draw)).round().long().clamp(20, 165)
    x = torch.randn(size, int(lengths.max()), 3, generator=draw)
    return x, torch.randint(0, 1000, (size,), generator=draw), lengths, torch.randn(x.shape, generator=draw)


def stepper(model: ChiroDiff, kernels: bool = False) -> Callable[[Batch], float]:
    """UsageError where kernels cannot be had."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    predict = sparse_step(model, {}) if kernels else model

    def step(batch: Batch) -> float:
        x, timesteps, lengths, eps = batch
        optimizer.zero_grad()
        loss = eps_mse(predict(x, timesteps, lengths=lengths), eps, lengths)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


def difference(model: ChiroDiff, reference: ChiroDiff) -> float:
    """Largest relative difference of the gradients of a parameter."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)  # type: ignore[operator, union-attr]


def measure(hidden: int, layers: int, size: int, turns: int, clock: Callable[[], float]) -> None:
    """Print the rows of one model size."""
    models = {name: model_of(kind, hidden, layers) for name, kind in KINDS.items()}
    steps = {name: stepper(model) for name, model in models.items() if name != KERNELS}
    missing = None
    try:
        steps[KERNELS] = stepper(models[KERNELS], kernels=True)
    except UsageError as error:
        missing = error
    losses = {name: step(batch_of(0, size)) for name, step in steps.items()}
    ours = [name for name in (OURS, KERNELS) if name in steps]
    worst = max(difference(models[name], models[EQUAL]) for name in ours)
    loss_off = max(abs(losses[name] / losses[EQUAL] - 1) for name in ours)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1, turns + 1):
        batch = batch_of(turn, size)
        for name, step in steps.items():
            start = clock()
            step(batch)
            seconds[name].append(clock() - start)
    count = sum(p.numel() for p in models[OURS].parameters())
    print(f"\n{count:,} parameters (h={hidden}, {layers} layers); relative difference to nn.GRU packed: ", end="")
    print(f"loss {loss_off:.1e}, gradients {worst:.1e}")
    heads = [f"times the {name} (min / median / max)" for name in ours]
    print(f"  {'':<14} {'ms a step':>10}   " + "   ".join(heads))
    for name, times in seconds.items():
        cells = [spread(times, seconds[one]).ljust(len(head)) for one, head in zip(ours, heads, strict=True)]
        print(f"  {name:<14} {statistics.median(times) * 1e3:>10.1f}   " + "   ".join(cells).rstrip())
    if missing:
        print(f"  {KERNELS:<14} left out: {missing}")


def spread(times: Sequence[float], base: Sequence[float]) -> str:
    """Ratios of the turns: min / median / max."""
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    return f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--turns", type=int, default=9, help="measured turns (default 9)")
    parser.add_argument("--batch", type=int, default=128, help="sketches per step (default 128)")
    parser.add_argument("--quick", action="store_true", help="the smallest model, 8 sketches, 2 turns: does it run?")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread on a machine in use")
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {options.threads} CPU thread(s), "
        + ("CPU time" if options.cpu_time else "wall clock")
    )
    if options.quick:
        measure(*SIZES[-1], size=8, turns=2, clock=clock)
        return
    for hidden, layers in SIZES:
        measure(hidden, layers, options.batch, options.turns, clock)


if __name__ == "__main__":
    main()

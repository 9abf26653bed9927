"""ChiroDiff's training step on a CPU through compiled kernels that touch the active weights only.

The prediction is that of `ChiroDiff.forward` and the gradients are those of its parameters, to rounding (1e-5), but the
gradient of a GRU's weight outside its mask is 0 here: a step whose dense gradients are needed (RigL's growth) is one
for the model itself. `mix` and `out` get their dense gradients, which cost next to nothing.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raysparse import native
from raysparse.models import _cpu
from raysparse.models import _sparse_layout as layout
from raysparse.models._sparse_memory import Memory
from raysparse.models.chirodiff import BY_POINT

_SOURCE = Path(__file__).parent / "native" / "chirodiff_train.cpp"
# Where it beats the packed GRU: (weights of a direction of a layer, active or not; density), each at most. Times faster
# with 3 layers of h = 16 to 320, on an Intel Xeon with 64 sketches: 9 thousand weights, density 1, 2.3 (1.6 with 8); 37
# thousand, 1, 1.1; 83 thousand, .75 to .8, 1.1 to 1.01 (.9: .83); 147 thousand, .65, 1.05 (.75: .91); 332 thousand, .45
# to .55, 1.11 to 1.0 (.65: .83); 590 thousand, .4, 1.26 (.5: .94); 922 thousand, .4, 1.08 (.5: .92). On an AMD EPYC
# with 64 sketches (held to AVX2; with 32): 99 thousand, 1, 1.31 (1.16; 1.14); 200 thousand, .8 to .9, 1.18 to 1.01
# (.85: 1.16; 1.05); 349 thousand, .6 to .7, 1.08 to 1.02 (.65: 1.2; 1.11), .8, .89; 599 thousand, .5 to .6, 1.21 to
# 1.04 (.55: 1.13; 1.06); 922 thousand, .5, 1.08 (.45: 1.06; 1.09). Larger: a guess.
_INTEL = (
    (10_000, 4.0),
    (40_000, 1.0),
    (90_000, 0.78),
    (150_000, 0.67),
    (350_000, 0.52),
    (600_000, 0.45),
    (math.inf, 0.4),
)
_AMD = ((30_000, 1.25), (100_000, 1.0), (200_000, 0.85), (350_000, 0.65), (600_000, 0.55), (math.inf, 0.4))
_PAYS = {"intel": _INTEL, "amd": _AMD, "narrow": _AMD}[_cpu.KIND]
# With fewer sketches lanes are empty, so the density must be lower by as much. On the EPYC 16 sketches are .91 to 1.07
# times as fast at the densities of _AMD for 99 to 922 thousand weights, 1.07 to 1.41 at .7 to .8 of these. Before
# TOGETHER, with h = 32, 64, 128 and 256, 8 are 1.7, .93, .67 and .51 times as fast at density .5, 2.2, 1.5, 1.07 and
# 1.05 at .25; 2 are 1.65, 1.0, .57 and .48 at .25 and 2.3, 1.5, .99 and .94 at .1. On the Xeon 32 sketches are .99 and
# 1.04 times as fast at the densities of _INTEL for 83 and 332 thousand weights; 24 1.09 at .6 (.7: .9) and .98 at .4
# (.5: .82), 16 .99 at .5 and .86 at .4, 8 1.3 at .2 and .95 at .3 for the former, 4 .99 at .1 for the latter.
_MANY = {"intel": 32, "amd": 20, "narrow": 20}[_cpu.KIND]


class _Side(ctypes.Structure):
    _fields_ = [
        ("side", layout.Side),
        ("gates", ctypes.c_int64),
        *layout.fields("rows places weights d_values d_bias", ctypes.c_void_p),
    ]


class _Net(ctypes.Structure):
    _fields_ = [
        *layout.fields("sides source widths", ctypes.c_void_p),
        ("head", layout.Head),
        ("layers", ctypes.c_int32),
        *layout.fields("places most", ctypes.c_int64),
    ]


class _Gradient(ctypes.Structure):
    _fields_ = layout.fields("d_y d_start d_tail d_head", ctypes.c_void_p)


class SparseStep(nn.Module):
    """forward(x, timesteps, lengths, labels) as ChiroDiff's, of the model's parameters as they are at each call.

    masks: of its weights by name, as a SparseEngine has them; a weight without one counts as active everywhere. Weights
    outside their masks are taken for 0. `follow` after a change of the masks. A backward pass must come before the next
    forward pass or `follow`. Runs on torch.get_num_threads() threads; what comes out does not depend on how many.

    UsageError: no plain ChiroDiff of float32 on the CPU, or no compiler (see `native.load`).
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        checked = layout.check(model)
        self._model = [checked]  # in a list: its parameters are not this module's
        self._library = native.load(_SOURCE)
        self._library.raysparse_kept.restype = self._library.raysparse_scratch.restype = ctypes.c_int64
        self._width = int(self._library.raysparse_width())
        self._kept, self._scratch = Memory(), Memory()
        self._turn = 0  # forward passes and layouts so far: a backward pass needs the last one's pointers
        self._masks: dict[str, Tensor] = {}
        self._scales = layout.gate_scales().repeat(checked.config.hidden)  # of one direction's gates
        self._lay_out(masks)

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Take over new masks; nothing is done where they are those it has (the same tensors)."""
        known = self._masks
        if masks.keys() != known.keys() or any(mask is not known[name] for name, mask in masks.items()):
            self._lay_out(masks)

    def pays_for(self, examples: int) -> bool:
        """Whether it is faster than PyTorch with so many sketches at a time, by what was measured."""
        columns = [len(by_column.rows) - 1 for by_column in self._by_column]
        sizes = [len(plan.counts) * 3 * wide for plan, wide in zip(self._plans, columns, strict=True)]
        density = sum(len(plan.active) for plan in self._plans) / sum(sizes)
        most = next(most for size, most in _PAYS if max(sizes) <= size)
        return density <= most * min(1.0, examples / _MANY)

    def forward(
        self, x: Tensor, timesteps: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """As `ChiroDiff.forward`, with its errors. ValueError: an x that wants a gradient."""
        if x.requires_grad:
            raise ValueError("the sparse step has no gradient of x; use the model itself")
        model = layout.check(self._model[0])  # it may have been cast or moved since
        lengths = layout.checked_points(lengths, x)
        order = lengths.argsort(descending=True, stable=True)
        with torch.autocast("cpu", enabled=False):
            by_sketch = layout.by_sketch(model)
            parameters: list[Tensor] = [*layout.sums(model, by_sketch, timesteps, labels), by_sketch.head]
            for layer in range(model.config.layers):
                for end in layout.SIDES:
                    w_in, w_state, bias = layout.direction(model, layer, end)
                    # The first layer's biases and its weights of time and class are in the sums.
                    parameters += [w_in, w_state, bias] if layer else [w_in[:, :BY_POINT], w_state, bias.detach()]
            return cast(Tensor, _Step.apply(self, x.float().contiguous(), order, lengths, *parameters))

    def _lay_out(self, masks: Mapping[str, Tensor]) -> None:
        model, row = self._model[0], 4 * self._width
        hidden, count, points = model.config.hidden, model.config.layers, BY_POINT
        places = points + 10 * hidden * count  # inputs, then states [layers, 2, h], then gates [layers, 2, h, 4]
        self._masks = {}  # until all is there: what stops this half way is made up for by the next `follow`
        self._turn += 1
        self._plans: list[layout.Plan] = []
        self._by_column: list[layout.ByColumn] = []
        self._sides = (_Side * (2 * count))()
        self._sources = torch.tensor([0, *(points + 2 * hidden * layer for layer in range(count - 1))]) * row
        self._widths = torch.tensor([points, *[2 * hidden] * (count - 1)], dtype=torch.int32)
        for number, slot in enumerate(self._sides):
            layer, side = divmod(number, 2)
            to = (points + number * hidden) * row
            before = to - int(self._sources[layer]) + (places if side else -places) * row
            used = self._of_side(masks, layer, layout.SIDES[side])
            plan = layout.plan(*used, before, row)
            by_column = layout.by_column(plan, used[0].shape[1], hidden, row)
            self._plans.append(plan)
            self._by_column.append(by_column)
            slot.side.counts, slot.side.offsets = plan.counts.data_ptr(), plan.offsets.data_ptr()
            slot.side.before, slot.side.to, slot.side.passes = before, to, 1
            slot.gates = (points + 2 * hidden * count + 4 * hidden * number) * row
            slot.rows, slot.places = by_column.rows.data_ptr(), by_column.places.data_ptr()
        last = (points + 2 * hidden * (count - 1)) * row
        self._net = _Net(
            ctypes.cast(self._sides, ctypes.c_void_p),
            self._sources.data_ptr(),
            self._widths.data_ptr(),
            layout.Head.of(model, None, last),
            count,
            places,
            max(len(plan.active) for plan in self._plans),
        )
        self._masks = dict(masks)

    def _of_side(self, by_name: Mapping[str, Tensor], layer: int, end: str) -> tuple[Tensor, Tensor]:
        """Masks of the weights of the input, as far as it differs by point, and of the state."""
        gru, masks = self._model[0].gru, []
        for name in (f"weight_ih_l{layer}{end}", f"weight_hh_l{layer}{end}"):
            mask = by_name.get(f"gru.{name}")
            masks.append(torch.ones_like(getattr(gru, name), dtype=torch.bool) if mask is None else mask)
        return masks[0][:, : int(self._widths[layer])], masks[1]

    def _call(self, name: str, *arguments: Any) -> None:
        getattr(self._library, f"raysparse_{name}")(
            ctypes.byref(self._net), *arguments, ctypes.c_int32(torch.get_num_threads())
        )

    def _bytes(self, name: str, points: int) -> int:
        return int(getattr(self._library, f"raysparse_{name}")(ctypes.byref(self._net), ctypes.c_int64(points)))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: SparseStep, x: Tensor, order: Tensor, lengths: Tensor, *parameters: Tensor) -> Tensor:
        start, tail, head, *weights = parameters
        start, tail, head = start * step._scales.repeat(2), tail.contiguous(), head.contiguous()
        ctx.kept = [x, start, tail, order, lengths, head]  # what pointers point at until the backward pass
        for slot, plan, by_column, w_in, w_state, bias in zip(
            step._sides, step._plans, step._by_column, weights[0::3], weights[1::3], weights[2::3], strict=True
        ):
            active = torch.cat((w_in.flatten(), w_state.flatten())).index_select(0, plan.active)
            values, bias = active * plan.scale, bias * step._scales
            weights_by_column = active.index_select(0, by_column.order)
            ctx.kept += [values, bias, weights_by_column]
            slot.side.values, slot.side.bias, slot.weights = (
                tensor.data_ptr() for tensor in (values, bias, weights_by_column)
            )
        (sketches, points, _), outputs = x.shape, step._net.head.outputs
        y = torch.zeros(sketches, points, outputs)
        step._net.head.weights = head.data_ptr()
        pointers = (tensor.data_ptr() for tensor in (x, start, tail, y, order, lengths))
        ctx.sketches = layout.Sketches(*pointers, sketches, points)
        chunks = -(-sketches // step._width)
        ctx.memory = ctypes.c_void_p(step._kept.at_least(chunks * step._bytes("kept", points)))
        step._call("forward", ctypes.byref(ctx.sketches), ctx.memory)
        step._turn += 1
        ctx.step, ctx.turn, ctx.shapes = step, step._turn, [weight.shape for weight in weights]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        step, (hidden, outputs) = ctx.step, (ctx.step._net.head.hidden, ctx.step._net.head.outputs)
        if step._turn != ctx.turn:
            raise RuntimeError(
                "another forward pass, or other masks, came between: the sparse step keeps what one backward pass needs"
            )
        sketches, points = ctx.sketches.sketches, ctx.sketches.points
        chunks = -(-sketches // step._width)
        d_y, d_start = grad_outputs[0].float().contiguous(), torch.empty(sketches, 8 * hidden)
        d_tail, d_head = torch.zeros(sketches, outputs), torch.zeros(chunks, outputs, 2 * hidden)
        d_values = [torch.empty(chunks, len(plan.active)) for plan in step._plans]
        d_bias = [torch.empty(chunks, 4 * hidden) for _ in step._plans]
        for slot, values, bias in zip(step._sides, d_values, d_bias, strict=True):
            slot.d_values, slot.d_bias = values.data_ptr(), bias.data_ptr()
        gradient = _Gradient(*(tensor.data_ptr() for tensor in (d_y, d_start, d_tail, d_head)))
        scratch = ctypes.c_void_p(step._scratch.at_least(torch.get_num_threads() * step._bytes("scratch", points)))
        step._call("backward", ctypes.byref(ctx.sketches), ctypes.byref(gradient), ctx.memory, scratch)
        grads: list[Tensor | None] = [d_start, d_tail, d_head.sum(0)]
        for number, plan in enumerate(step._plans):
            of_input, of_state = ctx.shapes[3 * number : 3 * number + 2]
            whole = torch.zeros(of_input.numel() + of_state.numel())
            whole[plan.active] = d_values[number].sum(0)
            grads += [whole[: of_input.numel()].view(of_input), whole[of_input.numel() :].view(of_state)]
            grads.append(d_bias[number].sum(0) if number > 1 else None)  # the first layer's is in d_start
        return None, None, None, None, *grads

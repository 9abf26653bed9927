"""ChiroDiff's training step on a CPU through compiled kernels that touch the active weights only.

The prediction is that of `ChiroDiff.forward` and the gradients are those of its active weights, to rounding (1e-5); the
gradient of a weight outside the masks is left 0, so a step that needs it (RigL's growth) is one for the model itself.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raysparse import native
from raysparse.errors import UsageError
from raysparse.models._sparse_chirodiff import _by_point, _by_unit, _check_lengths, _points_of, _Side
from raysparse.models.chirodiff import ChiroDiff

_SOURCE = Path(__file__).parent / "native" / "chirodiff_train.cpp"
_ALIGNMENT = 64


class _TrainSide(ctypes.Structure):
    _fields_ = [
        ("side", _Side),
        ("kept", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "places", "weights", "d_values", "d_bias")),
    ]


class _TrainNet(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sides", "source", "widths", "head")),
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("places", "last", "most")),
    ]


class _TrainBatch(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "start", "tail", "y", "d_y", "d_start", "d_tail", "d_head", "order", "lengths")
        ),
        ("sketches", ctypes.c_int64),
        ("points", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    ]


class _Plan(NamedTuple):
    """Where the active weights of one direction of a layer lie; both orders are of the same weights.

    active: int64 [weights], places in W_ih (its columns by point) and W_hh, each [3 h, n], flattened end to end
    """

    active: Tensor
    scale: Tensor  # float32 [weights] what the kernel wants them multiplied with
    counts: Tensor
    offsets: Tensor
    by_column: Tensor  # int64 [weights] their order by column
    rows: Tensor
    places: Tensor


class SparseTrainer(nn.Module):
    """forward(x, timesteps, lengths, labels) as ChiroDiff's, of its parameters as they are, with sparse gradients.

    masks: of the weights by name, as the engine has them; a weight without one is dense. Call `plan` again after each
    change of the masks. One backward per forward pass, before the next one.
    """

    def __init__(self, model: ChiroDiff, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._library = native.load(_SOURCE)
        self._library.raysparse_train_scratch.restype = ctypes.c_int64
        self._width = int(self._library.raysparse_width())
        self._model = [model]
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.plan(masks)

    def plan(self, masks: Mapping[str, Tensor]) -> None:
        model = self._model[0]
        hidden, count, inputs = model.config.hidden, model.config.layers, _points_of(model)
        row = 4 * self._width
        self._places = inputs + 10 * hidden * count
        self._plans = []
        sides = (_TrainSide * (2 * count))()
        self._source = torch.tensor([0, *(inputs + 2 * hidden * layer for layer in range(count - 1))]) * row
        self._widths = torch.tensor([inputs, *[2 * hidden] * (count - 1)], dtype=torch.int32)
        for layer in range(count):
            source = int(self._source[layer])
            for side, end in enumerate(("", "_reverse")):
                name = f"l{layer}{end}"
                used = []
                for kind in ("weight_ih", "weight_hh"):
                    weight, mask = getattr(model.gru, f"{kind}_{name}"), masks.get(f"gru.{kind}_{name}")
                    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
                    used.append(mask[:, :inputs] if layer == 0 and kind == "weight_ih" else mask)
                to = (inputs + (2 * layer + side) * hidden) * row
                before = to - source + (self._places * row if side else -self._places * row)
                plan = _plan(used[0], used[1], before, row)
                self._plans.append(plan)
                slot = sides[2 * layer + side]
                slot.side.counts, slot.side.offsets = plan.counts.data_ptr(), plan.offsets.data_ptr()
                slot.side.before, slot.side.to = before, to
                slot.kept = (inputs + 2 * hidden * count + (2 * layer + side) * 4 * hidden) * row
                slot.rows, slot.places = plan.rows.data_ptr(), plan.places.data_ptr()
        self._sides = sides
        most = max(len(plan.active) for plan in self._plans)
        self._net = _TrainNet(
            ctypes.cast(sides, ctypes.c_void_p), self._source.data_ptr(), self._widths.data_ptr(), None,
            count, hidden, inputs, model.out.out_features,
            self._places, (inputs + 2 * hidden * (count - 1)) * row, most,
        )

    def forward(self, x: Tensor, timesteps: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        model, (sketches, points, _) = self._model[0], x.shape
        model._check_labels(labels)
        lengths = torch.full((sketches,), points) if lengths is None else lengths.contiguous()
        _check_lengths(lengths, sketches, points)
        hidden, inputs = model.config.hidden, self._net.inputs
        with torch.autocast("cpu", enabled=False):
            by_sketch = model._time_features(timesteps)
            mixed, timed = model.out.weight[:, :hidden], model.out.weight[:, hidden:]
            tail = by_sketch @ timed.T + (model.out.bias + mixed @ model.mix.bias)
            head = mixed @ model.mix.weight
            if labels is not None:
                by_sketch = torch.cat((by_sketch, model.labels(labels)), 1)
            starts, tensors = [], []
            for layer in range(model.config.layers):
                for end in ("", "_reverse"):
                    w_in, w_state, b_in, b_state = (
                        getattr(model.gru, f"{kind}_l{layer}{end}")
                        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                    )
                    i, s = b_in.view(3, -1), b_state.view(3, -1)
                    bias = torch.stack((i[0] + s[0], i[1] + s[1], i[2], s[2]), 1).flatten()
                    if layer == 0:
                        weight = _by_unit(torch.stack(w_in[:, inputs:].chunk(3))).flatten(0, 1)
                        starts.append(torch.addmm(bias, by_sketch, weight.T))
                        w_in = w_in[:, :inputs]
                        bias = bias.detach()
                    tensors += [w_in, w_state, bias]
            start = torch.stack(starts, 1)
            order = lengths.argsort(descending=True, stable=True)
            return cast(Tensor, _Step.apply(self, _by_point(x.float()), order, lengths, start, tail, head, *tensors))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trainer: SparseTrainer, x: Tensor, order: Tensor, lengths: Tensor, *given: Tensor) -> Tensor:
        start, tail, head, *tensors = given
        net, sides = trainer._net, trainer._sides
        sketches, points, _ = x.shape
        hidden = net.hidden
        chunks = -(-sketches // trainer._width)
        scales = _scales().repeat(hidden)
        values, weights, biases = [], [], []
        for plan, w_in, w_state, bias in zip(trainer._plans, tensors[0::3], tensors[1::3], tensors[2::3], strict=True):
            found = torch.cat((w_in.flatten(), w_state.flatten())).index_select(0, plan.active)
            values.append(found * plan.scale)
            weights.append(found.index_select(0, plan.by_column))
            biases.append(bias * scales)
        scaled = (start * scales).contiguous()
        tail, head = tail.contiguous(), head.contiguous()
        for number, side in enumerate(sides):
            side.side.values, side.side.bias = values[number].data_ptr(), biases[number].data_ptr()
            side.weights = weights[number].data_ptr()
        net.head = head.data_ptr()
        y = torch.zeros(sketches, points, net.outputs)
        threads = torch.get_num_threads()
        scratch = trainer._library.raysparse_train_scratch(ctypes.byref(net), ctypes.c_int64(points))
        kept = chunks * (points + 2) * trainer._places * 4 * trainer._width
        need = kept + threads * scratch + _ALIGNMENT
        if len(trainer._buffer) < need:
            trainer._buffer = torch.empty(need, dtype=torch.uint8)
        at = -(-trainer._buffer.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        batch = _TrainBatch(
            x.data_ptr(), scaled.data_ptr(), tail.data_ptr(), y.data_ptr(), None, None, None, None,
            order.data_ptr(), lengths.data_ptr(), sketches, points, at, at + kept,
        )
        trainer._library.raysparse_forward(ctypes.byref(net), ctypes.byref(batch), ctypes.c_int32(threads))
        ctx.trainer, ctx.batch, ctx.chunks = trainer, batch, chunks
        ctx.kept = (x, order, lengths, scaled, tail, head, values, weights, biases)
        ctx.shapes = [tensor.shape for tensor in tensors]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        trainer, batch, chunks = ctx.trainer, ctx.batch, ctx.chunks
        net, sides = trainer._net, trainer._sides
        hidden, outputs, sketches = net.hidden, net.outputs, batch.sketches
        d_y = grad_outputs[0].contiguous()
        d_start = torch.empty(sketches, 2, 4 * hidden)
        d_tail, d_head = torch.zeros(sketches, outputs), torch.empty(chunks, outputs, 2 * hidden)
        d_values = [torch.empty(chunks, len(plan.active)) for plan in trainer._plans]
        d_bias = [torch.empty(chunks, 4 * hidden) for _ in trainer._plans]
        for number, side in enumerate(sides):
            side.d_values, side.d_bias = d_values[number].data_ptr(), d_bias[number].data_ptr()
        batch.d_y, batch.d_start = d_y.data_ptr(), d_start.data_ptr()
        batch.d_tail, batch.d_head = d_tail.data_ptr(), d_head.data_ptr()
        threads = torch.get_num_threads()
        trainer._library.raysparse_backward(ctypes.byref(net), ctypes.byref(batch), ctypes.c_int32(threads))
        grads: list[Tensor | None] = []
        for number, plan in enumerate(trainer._plans):
            in_shape, state_shape, _ = ctx.shapes[3 * number : 3 * number + 3]
            whole = torch.zeros(in_shape.numel() + state_shape.numel())
            whole[plan.active] = d_values[number].sum(0)
            split = in_shape.numel()
            grads += [whole[:split].view(in_shape), whole[split:].view(state_shape)]
            grads.append(d_bias[number].sum(0) if number > 1 else None)
        return (None, None, None, None, d_start, d_tail, d_head.sum(0), *grads)


def _scales() -> Tensor:
    """Of r, z, n, q: see Side in gru.h."""
    return -math.log2(math.e) * torch.tensor([1.0, 1.0, 2.0, 2.0])


def _plan(in_mask: Tensor, state_mask: Tensor, before: int, row: int) -> _Plan:
    """in_mask: bool [3 h, inputs], state_mask: bool [3 h, h]."""
    inputs, hidden = in_mask.shape[1], state_mask.shape[1]
    columns = inputs + hidden
    used = torch.cat((in_mask, state_mask), 1).view(3, hidden, columns).permute(1, 2, 0)  # [h, columns, 3]
    used_by = (used * torch.tensor([1, 2, 4])).sum(2)
    column = torch.arange(columns)
    group = torch.where(used_by > 0, used_by - 1 + 7 * (column >= inputs), 14)
    counts = nn.functional.one_hot(group, 15)[:, :, :14].sum(1)
    order = group.argsort(dim=1, stable=True)
    chosen = order[group.gather(1, order) < 14]
    offsets = torch.where(chosen < inputs, chosen * row, (chosen - inputs) * row + before)
    unit, rank, gate = used.gather(1, order[:, :, None].expand_as(used)).nonzero(as_tuple=True)
    at = order[unit, rank]  # column of each active weight
    line = gate * hidden + unit  # row of W_ih and W_hh
    active = torch.where(at < inputs, line * inputs + at, 3 * hidden * inputs + line * hidden + at - inputs)
    last = (gate == 2) & (at >= inputs)  # q
    scale = _scales()[gate + last]
    target = torch.where(at < inputs, hidden + at, at - inputs)  # the states' columns come first
    place = (4 * unit + gate + last) * row
    by_column = target.argsort(stable=True)
    rows = torch.zeros(columns + 1, dtype=torch.int32)
    rows[1:] = torch.bincount(target, minlength=columns).cumsum(0)
    return _Plan(active, scale, counts.int().contiguous(), offsets.int(), by_column, rows, place[by_column].int())

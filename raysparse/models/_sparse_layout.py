"""How ChiroDiff's weights and sketches are handed to the compiled kernels: what sampling and training share.

See raysparse/models/native/gru.h for the kernels' side of it.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysparse.errors import UsageError
from raysparse.models.chirodiff import BY_POINT, CHANNELS, ChiroDiff

SIDES = ("", "_reverse")
_DERIVED = ("plain", "abs", "del")  # numbered as in chunk.h
_LISTS = 11  # of a unit's columns that the same gates use; a column that none uses is in no list


def fields(names: str, kind: type) -> list[tuple[str, type]]:
    """Of a ctypes.Structure, all of one kind."""
    return [(name, kind) for name in names.split()]


class Side(ctypes.Structure):
    _fields_ = [
        *fields("counts offsets values bias", ctypes.c_void_p),
        *fields("before to", ctypes.c_int64),
        *fields("passes input_passes", ctypes.c_int32),
    ]


class Head(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_void_p),
        *fields("hidden inputs outputs derived", ctypes.c_int32),
        ("last", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, model: ChiroDiff, weights: int | None, last: int) -> Head:
        """weights: the address of float32 [3, 2 h], None: yet to come. last: see chunk.h."""
        return cls(weights, model.config.hidden, BY_POINT, CHANNELS, _DERIVED.index(model.config.inputs), last)


class Sketches(ctypes.Structure):
    _fields_ = [
        *fields("x start tail y order lengths", ctypes.c_void_p),
        *fields("sketches points", ctypes.c_int64),
    ]


class Plan(NamedTuple):
    """Where the active weights of one direction of a layer lie, in the kernel's order."""

    active: Tensor  # int64 [weights] places in W_ih (the columns that differ by point) and W_hh, flattened, end to end
    scale: Tensor  # float32 [weights] what the kernel wants them multiplied with
    counts: Tensor  # int32 [h, 11]; see Side in gru.h
    offsets: Tensor  # int32 [weights]
    columns: Tensor  # int64 [weights] of the input, then of the state
    gates: Tensor  # int64 [weights] 4 unit + r, z, n or q


def plan(in_mask: Tensor, state_mask: Tensor, before: int, row: int, begin: int = 0, end: int | None = None) -> Plan:
    """Of the columns begin .. end - 1, of the input and then of the state.

    in_mask: bool [3 h, inputs], state_mask: bool [3 h, h] of rows r, z, n; row: bytes of a feature.
    """
    inputs, hidden = in_mask.shape[1], state_mask.shape[1]
    both = torch.cat((in_mask, state_mask), 1)[:, begin:end]
    used = both.reshape(3, hidden, -1).permute(1, 2, 0)  # [h, columns, 3]
    used_by = (used * torch.tensor([1, 2, 4])).sum(2)  # bits: r, z, n or q
    is_state = begin + torch.arange(both.shape[1]) >= inputs
    of_state = is_state & (used_by >= 4)  # where input and state differ: n is of the input, q of the state
    group = torch.where(used_by > 0, used_by - 1 + 4 * of_state, _LISTS)
    counts = nn.functional.one_hot(group, _LISTS + 1)[:, :, :_LISTS].sum(1)
    order = group.argsort(dim=1, stable=True)
    walked = begin + order[group.gather(1, order) < _LISTS]
    offsets = torch.where(walked < inputs, walked * row, (walked - inputs) * row + before)
    unit, rank, gate = used.gather(1, order[:, :, None].expand_as(used)).nonzero(as_tuple=True)
    column, line = begin + order[unit, rank], gate * hidden + unit
    active = torch.where(column < inputs, line * inputs + column, line * hidden + column + (3 * hidden - 1) * inputs)
    gate += (gate == 2) & (column >= inputs)  # q for n
    scale = gate_scales().index_select(0, gate)
    return Plan(active, scale, counts.int().contiguous(), offsets.int(), column, 4 * unit + gate)


class ByColumn(NamedTuple):
    """The same weights in the order of their columns, the state's first: as gradients of the columns are summed."""

    order: Tensor  # int64 [weights] the kernel's order -> this one
    rows: Tensor  # int32 [h + inputs + 1] where each column's begin
    places: Tensor  # int32 [weights] bytes from the gradients of the gates


def by_column(plan: Plan, inputs: int, hidden: int, row: int) -> ByColumn:
    """Of a plan of all columns."""
    columns = torch.where(plan.columns < inputs, hidden + plan.columns, plan.columns - inputs)
    order = columns.argsort(stable=True)
    rows = torch.zeros(inputs + hidden + 1, dtype=torch.int32)
    rows[1:] = torch.bincount(columns, minlength=inputs + hidden).cumsum(0)
    return ByColumn(order, rows, (row * plan.gates)[order].int())


def gate_scales() -> Tensor:
    """Of r, z, n, q: what their weights and biases are multiplied with, so that 2^x takes the place of exp."""
    return -math.log2(math.e) * torch.tensor([1.0, 1.0, 2.0, 2.0])


def check(model: nn.Module) -> ChiroDiff:
    """UsageError where the kernels do not compute what the model does."""
    if type(model) is not ChiroDiff or any(part._forward_pre_hooks or part._forward_hooks for part in model.modules()):
        raise UsageError(f"it takes a plain ChiroDiff, got {type(model).__name__} or one with hooks")
    weight = model.mix.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
        raise UsageError(f"it computes float32 on the CPU (--device cpu), the model is {kind}")
    return model


def checked_points(lengths: Tensor | None, x: Tensor) -> Tensor:
    """int64 [B] as ChiroDiff takes them, None: all points. ValueError: out of range, or an x that is not [B, L, 3]."""
    sketches, points, channels = x.shape
    if channels != CHANNELS:
        raise ValueError(f"x must be [sketches, points, {CHANNELS}], got {list(x.shape)}")
    if lengths is None:
        return torch.full((sketches,), points)
    if lengths.shape != (sketches,) or int(lengths.min()) < 1 or int(lengths.max()) > points:
        raise ValueError(f"lengths must be {sketches} numbers in 1 .. {points}, got {lengths.tolist()}")
    return lengths.long().contiguous()


def direction(model: ChiroDiff, layer: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """W_ih [3 h, inputs], W_hh [3 h, h] and the gates' biases [4 h]: r, z, n, q of each unit."""
    w_in, w_state, b_in, b_state = (
        getattr(model.gru, f"{name}_l{layer}{side}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    of_input, of_state = b_in.view(3, -1), b_state.view(3, -1)
    both = of_input[:2] + of_state[:2]
    return w_in, w_state, torch.cat((both, of_input[2:], of_state[2:])).T.flatten()


class BySketch(NamedTuple):
    """How what is the same for all points of a sketch, its time and class, counts; and the read-out."""

    start_bias: Tensor  # [8 h] of the first layer's gates of both directions
    start: Tensor  # [8 h, time and class]
    tail_bias: Tensor  # [3] of the prediction
    tail: Tensor  # [3, time, or time and class]
    head: Tensor  # [3, 2 h] what the last layer's states are multiplied with


def by_sketch(model: ChiroDiff) -> BySketch:
    """Of the model's weights."""
    hidden = model.config.hidden
    mixed, timed = model.out.weight[:, :hidden], model.out.weight[:, hidden:]
    starts, biases = [], []
    for side in SIDES:
        w_in, _, bias = direction(model, 0, side)
        by_unit = w_in[:, BY_POINT:].view(3, hidden, -1).transpose(0, 1)  # [h, 3, n]
        starts.append(nn.functional.pad(by_unit, (0, 0, 0, 1)).flatten(0, 1))  # q has none
        biases.append(bias)
    tail_bias = model.out.bias + mixed @ model.mix.bias
    return BySketch(torch.cat(biases), torch.cat(starts), tail_bias, timed, mixed @ model.mix.weight)


def sums(model: ChiroDiff, weights: BySketch, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, 8 h] the first layer's gates before the inputs that differ by point, [B, 3] the prediction before the states.

    Labels are checked as the model does.
    """
    model._check_labels(labels)
    to_gru, to_out = model.by_sketch(timesteps, labels)
    start = torch.addmm(weights.start_bias, to_gru, weights.start.T)
    return start, torch.addmm(weights.tail_bias, to_out, weights.tail.T)

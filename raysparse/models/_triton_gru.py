# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Triton kernels of a GRU's recurrence, both directions and all time steps in one launch; `_cuda_gru` calls them.

cuDNN starts some kernels for each time step, which leave most of a GPU idle at the sizes of ChiroDiff. Here a program
takes ROWS sketches in one direction through all their points, with W_hh in registers and the state never leaving it.

Per point, padded to L in a sketch: gates q, r, z, n, of which q = W_hn h + b_hn, and r scales q inside n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of 4, 8 and 16 warps on an H200, 128 sketches of 165 points in float32: forward .70, .48, .54 ms at h = 96 and .28,
# .21, .29 at h = 48, backward -, .50, .63 and .27, .23, .38; of 32 such trials together 2.9, 1.9, 2.3; -, 2.0, 2.7 at
# h = 96. (-: it does not fit the registers.) Programs of 32 sketches took 1.7 to 2.4 times as long.
_WARPS = 8
WIDEST = 128  # h: three times 128 x 128 weights are what one multiprocessor holds


def run(
    given: Tensor, w_hh: Tensor, bias: Tensor, lengths: Tensor, rows: int, tf32: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The states, and if kept the gates.

    given: [K, B, L, 2, 3 h], r, z and n of W_ih x; w_hh: [K, 2, 3 h, h]; bias: [K, 2, 4 h] of q, r, z, n; lengths:
    int32 [K, B]. K: trials. -> [K, B, L, 2, h], 0 beyond a length; [K, B, L, 2, 4 h].
    """
    trials, batch, points, _, triple = given.shape
    hidden = triple // 3
    states = given.new_empty(trials, batch, points, 2, hidden)
    gates = given.new_empty(trials, batch, points, 2, 4 * hidden) if keep else None
    _forward[(triton.cdiv(batch, rows), 2 * trials)](
        *(given, w_hh, bias, lengths, states, states if gates is None else gates),
        *(batch, points, hidden),
        **_constants(hidden, rows, tf32),
        KEEP=keep,
        num_warps=_WARPS,
    )
    return states, gates


def run_back(
    d_states: Tensor, gates: Tensor, states: Tensor, w_hh: Tensor, lengths: Tensor, rows: int, tf32: bool
) -> Tensor:
    """d_states: [K, B, L, 2, h]. -> [K, B, L, 2, 4 h], gradients of q, r, z, n before activation, 0 beyond a length."""
    trials, batch, points, _, hidden = states.shape
    d_gates = torch.empty_like(gates)
    _backward[(triton.cdiv(batch, rows), 2 * trials)](
        *(d_states, gates, states, w_hh, lengths, d_gates),
        *(batch, points, hidden),
        **_constants(hidden, rows, tf32),
        num_warps=_WARPS,
    )
    return d_gates


def shared_bytes(hidden: int, size: int) -> int:
    """What the wider of the two kernels takes of a multiprocessor's shared memory, of numbers of so many bytes.

    Seen in the compiled kernels for h = 128: 110,592 with 2, 221,184 with 4.
    """
    wide = _wide(hidden)
    return 3 * wide * wide * size + 24 * 1024 if wide <= WIDEST else 2**31


def _wide(hidden: int) -> int:
    wide: int = max(16, triton.next_power_of_2(hidden))
    return wide


def _constants(hidden: int, rows: int, tf32: bool) -> dict[str, object]:
    return {
        "ROWS": rows,
        "WIDE": _wide(hidden),
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_stages": 1,
    }


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _load3(pointer, hidden, mask):
    return (
        tl.load(pointer, mask=mask, other=0.0).to(tl.float32),
        tl.load(pointer + hidden, mask=mask, other=0.0).to(tl.float32),
        tl.load(pointer + 2 * hidden, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _store4(pointer, q, r, z, n, hidden, mask):
    tl.store(pointer, q, mask=mask)
    tl.store(pointer + hidden, r, mask=mask)
    tl.store(pointer + 2 * hidden, z, mask=mask)
    tl.store(pointer + 3 * hidden, n, mask=mask)


@triton.jit
def _forward(
    given,
    w_hh,
    biases,
    lengths,
    states,
    gates,
    batch,
    points,
    hidden,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):
    trial, back = tl.program_id(1) // 2, tl.program_id(1) % 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths + trial * batch + row, mask=row < batch, other=0)
    along, into = tl.arange(0, WIDE)[None, :], tl.arange(0, WIDE)[:, None]
    inside = along < hidden
    w = w_hh + tl.program_id(1).to(tl.int64) * 3 * hidden * hidden + along * hidden + into  # transposed
    square = inside & (into < hidden)
    w_r = tl.load(w, mask=square, other=0.0)
    w_z = tl.load(w + hidden * hidden, mask=square, other=0.0)
    w_n = tl.load(w + 2 * hidden * hidden, mask=square, other=0.0)
    bias = biases + tl.program_id(1) * 4 * hidden + along
    b_q = tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    b_r, b_z, b_n = _load3(bias + hidden, hidden, inside)
    first = (trial * batch + row).to(tl.int64) * points
    h = tl.zeros((ROWS, WIDE), tl.float32)
    time = tl.where(back == 1, length - 1, 0)
    step = 1 - 2 * back
    place = ((first + time) * 2 + back)[:, None]
    mask = (length > 0)[:, None] & inside
    next_r, next_z, next_n = _load3(given + place * 3 * hidden + along, hidden, mask)
    for done in range(tl.max(length)):
        r, z, n, at, here = next_r, next_z, next_n, place, mask
        place += 2 * step
        mask = (done + 1 < length)[:, None] & inside
        next_r, next_z, next_n = _load3(given + place * 3 * hidden + along, hidden, mask)
        last = h.to(w_r.dtype)
        r = _sigmoid(r + b_r + tl.dot(last, w_r, input_precision=PRECISION))
        z = _sigmoid(z + b_z + tl.dot(last, w_z, input_precision=PRECISION))
        q = tl.dot(last, w_n, input_precision=PRECISION) + b_q
        n = 2 * _sigmoid(2 * (n + b_n + r * q)) - 1
        h = tl.where(here, n + z * (h - n), h)
        tl.store(states + at * hidden + along, h, mask=here)
        if KEEP:
            _store4(gates + at * 4 * hidden + along, q, r, z, n, hidden, here)
    for time in range(_first_end(length, row < batch, points), points):
        empty = ((time >= length) & (row < batch))[:, None] & inside
        tl.store(states + ((first + time) * 2 + back)[:, None] * hidden + along, 0.0, mask=empty)


@triton.jit
def _first_end(length, there, points):
    """Where the shortest of a program's sequences ends."""
    return tl.min(tl.where(there, length, points))


@triton.jit
def _load_point(d_states, gates, states, place, step, along, hidden, here, done):
    """Its state's gradient, its gates and the state before it."""
    at = gates + place * 4 * hidden + along
    return (
        tl.load(d_states + place * hidden + along, mask=here, other=0.0),
        tl.load(at, mask=here, other=0.0),
        tl.load(at + hidden, mask=here, other=0.0),
        tl.load(at + 2 * hidden, mask=here, other=0.0),
        tl.load(at + 3 * hidden, mask=here, other=0.0),
        tl.load(states + (place - step) * hidden + along, mask=here & (done > 0), other=0.0),
    )


@triton.jit
def _backward(
    d_states,
    gates,
    states,
    w_hh,
    lengths,
    d_gates,
    batch,
    points,
    hidden,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    trial, back = tl.program_id(1) // 2, tl.program_id(1) % 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths + trial * batch + row, mask=row < batch, other=0)
    along, outof = tl.arange(0, WIDE)[None, :], tl.arange(0, WIDE)[:, None]
    inside = along < hidden
    w = w_hh + tl.program_id(1).to(tl.int64) * 3 * hidden * hidden + outof * hidden + along
    square = inside & (outof < hidden)
    w_r = tl.load(w, mask=square, other=0.0)
    w_z = tl.load(w + hidden * hidden, mask=square, other=0.0)
    w_n = tl.load(w + 2 * hidden * hidden, mask=square, other=0.0)
    first = (trial * batch + row).to(tl.int64) * points
    step = 2 - 4 * back  # to the later point of the direction
    done = tl.max(length) - 1
    place = ((first + tl.where(back == 1, length - 1 - done, done)) * 2 + back)[:, None]
    here = (done < length)[:, None] & inside
    d, q, r, z, n, before = _load_point(d_states, gates, states, place, step, along, hidden, here, done)
    d_h = tl.zeros((ROWS, WIDE), tl.float32)
    for _ in range(tl.max(length)):
        r_, z_, n_ = r.to(tl.float32), z.to(tl.float32), n.to(tl.float32)
        d_h += d.to(tl.float32)
        f_n = (1 - z_) * (1 - n_ * n_)
        f_z = (before.to(tl.float32) - n_) * z_ * (1 - z_)
        f_r = f_n * q.to(tl.float32) * r_ * (1 - r_)
        d_q, d_r = (d_h * f_n * r_).to(w_r.dtype), (d_h * f_r).to(w_r.dtype)
        d_z, d_n = (d_h * f_z).to(w_r.dtype), (d_h * f_n).to(w_r.dtype)
        put, there = d_gates + place * 4 * hidden + along, here
        d_h *= z_
        done -= 1
        place -= step
        here = ((done >= 0) & (done < length))[:, None] & inside
        d, q, r, z, n, before = _load_point(d_states, gates, states, place, step, along, hidden, here, done)
        d_h = tl.dot(d_r, w_r, d_h, input_precision=PRECISION)
        d_h = tl.dot(d_z, w_z, d_h, input_precision=PRECISION)
        d_h = tl.dot(d_q, w_n, d_h, input_precision=PRECISION)
        _store4(put, d_q, d_r, d_z, d_n, hidden, there)
    for time in range(_first_end(length, row < batch, points), points):
        empty = ((time >= length) & (row < batch))[:, None] & inside
        put = d_gates + ((first + time) * 2 + back)[:, None] * 4 * hidden + along
        _store4(put, 0.0, 0.0, 0.0, 0.0, hidden, empty)

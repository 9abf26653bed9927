"""A bidirectional GRU layer over padded sequences on a CUDA device, by the kernels of `_triton_gru`.

Nothing here waits for the device or depends on lengths but in the kernels, so a step is the same work for every batch:
a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS = 16  # sequences of a program, the fewest that a tensor core takes


@functools.cache
def kernels() -> ModuleType | None:
    """None without triton, which PyTorch for CUDA brings along on Linux."""
    try:
        return importlib.import_module("raysparse.models._triton_gru")
    except ImportError:
        return None


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take sequences like x and W_hh: their type, and three square matrices in the device's memory
    next to its cores."""
    found = kernels()
    if found is None or x.device.type != "cuda" or weight.dtype != torch.float32:
        return False
    own: int = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return bool(found.shared_bytes(weight.shape[1], compute_type(x.device, weight.dtype).itemsize) <= own)


def compute_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def layer(x: Tensor, weights: list[Tensor], lengths: Tensor) -> Tensor:
    """weights: W_ih, W_hh, b_ih, b_hh of the forward, then of the reverse direction, each [K, ...] for K trials.

    x: [K, B, L, in], lengths: int32 [K, B]. -> [K, B, L, 2 h] in autocast's type, where it is on; 0 beyond a length.
    """
    w_ih, w_hh, b_ih, b_hh = (torch.stack(weights[index::4], 1) for index in range(4))  # [K, 2, ...]
    hidden = w_hh.shape[-1]
    bias = torch.cat((b_hh[..., 2 * hidden :], b_ih + F.pad(b_hh[..., : 2 * hidden], (0, hidden))), -1)
    dtype = compute_type(x.device, w_hh.dtype)
    given = [tensor.to(dtype) for tensor in (x, w_ih, w_hh, bias)]
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _Layer.apply(*given, lengths)).flatten(3)


class _Layer(torch.autograd.Function):
    """x [K, B, L, in], w_ih [K, 2, 3 h, in], w_hh [K, 2, 3 h, h], bias [K, 2, 4 h] of q, r, z, n, lengths.

    -> states [K, B, L, 2, h]. Its products are TF32 where nn.GRU's on CUDA are, both ways.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
        keep, tf32 = any(ctx.needs_input_grad), torch.backends.cudnn.allow_tf32
        with _products_like_cudnn():
            given = x.flatten(1, 2) @ w_ih.flatten(1, 2).mT
        given = given.view(*x.shape[:3], 2, -1)
        run = cast(ModuleType, kernels()).run
        w_hh = w_hh.contiguous()
        states, gates = run(given, w_hh, bias.contiguous(), lengths, ROWS, tf32, keep)
        if keep:
            ctx.save_for_backward(x, w_ih, w_hh, gates, states, lengths)
            ctx.tf32 = tf32
        return cast(Tensor, states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, w_ih, w_hh, gates, states, lengths = ctx.saved_tensors
        hidden, d_states = w_hh.shape[-1], grad_outputs[0].contiguous()
        run_back = cast(ModuleType, kernels()).run_back
        d_gates = run_back(d_states, gates, states, w_hh, lengths, ROWS, ctx.tf32)  # [K, B, L, 2, 4 h]
        with torch.autocast(x.device.type, enabled=False), _products_like_cudnn():
            sides = [d_gates[..., side, hidden:].flatten(1, 2) for side in (0, 1)]
            d_w_ih = torch.stack([given.mT @ x.flatten(1, 2) for given in sides], 1)
            d_w_hh = torch.stack([_recurrent(d_gates[..., side, : 3 * hidden], states, side) for side in (0, 1)], 1)
            d_x = None
            if ctx.needs_input_grad[0]:
                d_x = torch.baddbmm(sides[0] @ w_ih[:, 0], sides[1], w_ih[:, 1]).view_as(x)
        d_bias = d_gates.flatten(1, 2).sum(1, dtype=torch.float32).to(x.dtype)  # [K, 2, 4 h]
        return d_x, d_w_ih, d_w_hh.roll(-hidden, 2), d_bias, None


def _recurrent(d_own: Tensor, states: Tensor, side: int) -> Tensor:
    """d_own [K, B, L, 3 h] times the states that the points of one direction started from: [K, 3 h, h].

    All sequences as one, shifted by a point, which copies nothing; less what so falls from a sequence on the next.
    """
    later, earlier = (slice(1, None), slice(None, -1)) if side == 0 else (slice(None, -1), slice(1, None))
    begin, end = (0, -1) if side == 0 else (-1, 0)
    states = states[..., side, :]
    total = d_own.flatten(1, 2)[:, later].mT @ states.flatten(1, 2)[:, earlier]
    return torch.baddbmm(total, d_own[:, later, begin].mT, states[:, earlier, end], alpha=-1)


@contextmanager
def _products_like_cudnn() -> Iterator[None]:
    """TF32 for float32 products where those of nn.GRU on CUDA are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

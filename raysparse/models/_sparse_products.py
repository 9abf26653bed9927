"""Linear layers and convolutions on a CPU through a compiled kernel that skips the weights that are 0: for sampling.

Any pattern of zeros is skipped, single ones too. What a layer computes is what the layer it stands for computes, to
rounding.
"""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysparse import native
from raysparse.errors import UsageError
from raysparse.models._sparse_memory import Memory

_SOURCE = Path(__file__).parent / "native" / "products.cpp"
_BLOCK = 256  # inputs that are walked before the next ones; see products.cpp
# The kernel's time in that of a dense product per weight and column: so much for each active weight, and so much for
# each input and output, which are laid out anew. Fitted to linear layers of 32 to 2,048 features and convolutions of 16
# to 256 channels: 512 x 1,536 at density .6, .5, .25, .1 is 1.2, 1.4, 2.5, 5.0 times faster, 64 x 64 at .5 and .1 .86
# and 1.4 times, a 3x3 convolution of 256 channels .92, 1.08, 1.8, 3.2 times, of 32 at .5 and .1 .88 and 1.3 times.
_ACTIVE = {nn.Linear: 1.2, nn.Conv2d: 1.65}
_LAID_OUT = 19
_FEW = 24  # columns (tokens, or pixels of all images) that fill too little of the kernel's vectors
_SMALL = 2_000_000  # columns x weights, which take PyTorch about 50 us: a call of the kernel costs 20 by itself


def with_sparse_products(model: nn.Module) -> nn.Module:
    """A copy of the model, as it is now, whose linear layers and convolutions skip their zeros where that is faster.

    UsageError: not float32 on the CPU, or no compiler (see `native.load`).
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        kind = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
        raise UsageError(f"it computes float32 on the CPU (--device cpu), the model is {kind}")
    native.load(_SOURCE)
    found, memory = copy.deepcopy(model), Memory()
    for owner in list(found.modules()):
        for name, layer in owner.named_children():
            if _takes(layer):
                setattr(owner, name, SparseProduct(layer, memory))
    return found


def _takes(layer: nn.Module) -> bool:
    """Whether the kernel computes what the layer does, and faster."""
    if type(layer) not in (nn.Linear, nn.Conv2d) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Conv2d) and (
        layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return False
    weight: Tensor = layer.weight  # type: ignore[assignment]
    active = int(weight.count_nonzero())
    return _ACTIVE[type(layer)] * active + _LAID_OUT * sum(weight.flatten(1).shape) < weight.numel()


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("starts", "offsets", "values", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "block")),
    ]


class _Images(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("count", "channels", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("kernel_height", "kernel_width", "down", "across")),
    ]


class SparseProduct(nn.Module):
    """forward(x) as the nn.Linear or nn.Conv2d that it stands for, in float32, no gradients. Not thread-safe.

    A weight that is 0 takes no part: an input that is not finite is not multiplied with it. Runs on
    torch.get_num_threads() threads; what comes out does not depend on how many. memory: a model's layers share it.
    """

    def __init__(self, layer: nn.Module, memory: Memory) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        self.layer = layer
        self._library = native.load(_SOURCE)
        self._width = int(self._library.raysparse_width())
        self._memory = memory
        with torch.no_grad():
            self._kept = (*_packed(layer.weight.flatten(1), 4 * self._width), _bias(layer))
        self._outputs, self._inputs = layer.weight.flatten(1).shape
        self._packed = _Layer(*(tensor.data_ptr() for tensor in self._kept), self._inputs, self._outputs, _BLOCK)

    @property
    def weight(self) -> Tensor:
        """Of the layer it stands for."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        with torch.autocast("cpu", enabled=False):
            layer = self.layer
            columns = x.numel() // x.shape[1 if isinstance(layer, nn.Conv2d) else -1]
            if columns < _FEW or columns * self._inputs * self._outputs < _SMALL:
                found: Tensor = layer(x)
                return found
            return self._convolve(x, layer) if isinstance(layer, nn.Conv2d) else self._linear(x)

    def _linear(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._outputs)
        tokens = ctypes.c_int64(y.numel() // self._outputs)
        self._run("linear", ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), tokens)
        return y

    def _convolve(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        assert not isinstance(layer.padding, str)  # see _takes
        (up, side), (down, across), kernel = layer.padding, layer.stride, layer.kernel_size
        if kernel == layer.stride == (1, 1) and not (up or side):  # one long row: no run of pixels ends early
            flat = x.flatten(2)[:, :, None]
            return self._windows(flat, kernel, 1, 1).view(len(x), self._outputs, *x.shape[2:])
        return self._windows(F.pad(x, (side, side, up, up)), kernel, down, across)

    def _windows(self, x: Tensor, kernel: tuple[int, ...], down: int, across: int) -> Tensor:
        """x: padded."""
        x = x.contiguous()
        count, channels, height, width = x.shape
        out = (height - kernel[0]) // down + 1, (width - kernel[1]) // across + 1
        y = x.new_empty(count, self._outputs, *out)
        sizes = (count, channels, height, width, *out, *kernel, down, across)
        self._run("convolve", ctypes.byref(_Images(x.data_ptr(), y.data_ptr(), *sizes)))
        return y

    def _run(self, name: str, *arguments: object) -> None:
        threads = torch.get_num_threads()
        size = 4 * threads * (self._inputs + self._outputs) * self._width
        memory = ctypes.c_void_p(self._memory.at_least(size))
        getattr(self._library, f"raysparse_{name}")(
            ctypes.byref(self._packed), *arguments, memory, ctypes.c_int32(threads)
        )


def _packed(weight: Tensor, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """starts, offsets and values of products.cpp's Layer from a weight [outputs, inputs]. row: bytes of an input."""
    outputs, inputs = weight.shape
    blocks = F.pad(weight, (0, -inputs % _BLOCK)).view(outputs, -1, _BLOCK).transpose(0, 1)
    used = blocks != 0
    starts = torch.zeros(used.shape[0] * outputs + 1, dtype=torch.int32)
    starts[1:] = used.sum(2).flatten().cumsum(0)
    return starts, (used.nonzero()[:, 2] * row).int(), blocks[used]


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().clone()

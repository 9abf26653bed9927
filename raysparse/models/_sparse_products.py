"""Linear layers and convolutions on a CPU through a compiled kernel that skips the weights that are 0: for sampling.

Any pattern of zeros is skipped, single ones too. What a layer computes is what the layer it stands for computes, to
rounding.
"""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysparse import native
from raysparse.errors import UsageError
from raysparse.models import _cpu
from raysparse.models import _sparse_pairs as pairs
from raysparse.models._sparse_memory import Memory


class Costs(NamedTuple):
    """Of a kernel's products per column; 1 is what a dense product takes for one weight."""

    single: float  # a weight, or a pair of weights
    tiled: float  # the same where four outputs take the same inputs, as in blocks
    laid_out: float  # an input or an output

    def of(self, kernel: Kernel) -> float:
        """All that it has counted."""
        return (self.tiled if kernel.tile > 1 else self.single) * kernel.used + self.laid_out * kernel.edges


# Fitted to linear layers of 64 to 1,536 features and convolutions of 32 to 256 channels. Times faster at density .6,
# .5, .25, .1: 512 x 1,536 is –, .98 to 1.05, 1.7 to 1.8, 2.3 to 3.1 (intel), 1.28, 1.52, 3.1, 5.2 (amd), 1.15, 1.36,
# 2.4, 4.5 (narrow); a 3x3 convolution of 256 channels –, 1.05, 1.8, 3.3; 1.01, 1.23, 1.9, 3.4; 1.06, 1.24, 2.2, 4.1;
# one of 32 at .5 and .1 .83, 1.43; .90, 1.6; 1.01, 2.0. By blocks of 16 512 x 1,536 is at .7, .5, .25, .1 1.11 to 1.19,
# 1.3 to 1.6, 2.1 to 2.7, 2.5 to 4.6 (intel), 1.48, 2.0, 3.7, 6.5 (amd; without tiles 1.26, 1.6, 2.9, 5.1), 1.36, 1.8,
# 3.1, 5.6 (narrow).
_BY_CPU = {"intel": Costs(1.8, 1.22, 17), "amd": Costs(1.35, 0.95, 18), "narrow": Costs(1.5, 1.13, 13)}
_COSTS = _BY_CPU[_cpu.KIND]
# Of pairs in bfloat16, on the EPYC (on an Intel Xeon they take as long as single weights in float32 or longer). Times
# faster than dense in bfloat16 at density .5, .25, .1, single weights; blocks: 512 x 1,536 is 1.03, 1.6, 3.0; 1.9, 3.2,
# 5.1; a 3x3 convolution of 256 channels .93, 1.4, 2.7.
_PAIRS = Costs(1.3, 0.95, 20)
# In blocks of 16 x 16 by AMX, on an Intel Xeon; here 1 is what a dense product in bfloat16 takes for one weight. Times
# faster at density .7, .5, .25, .1: 512 x 1,536 1.0, 1.4 to 1.7, 2.2, 3.7 to 4.0, 512 x 512 .85 to .96, 1.0 to 1.2, 1.4
# to 1.8, 1.9 to 2.2; a 3x3 convolution of 256 channels 1.6, 1.45, 2.2, 3.1, of 128 1.06, 1.2, 1.3, 2.2.
_BLOCKS = Costs(0, 2.2, 80)
_TILE, _BLOCK_TILE = 4, 16  # see products.cpp
_GROUPS = 16  # of tokens, whose sums of weights' gradients are added in order, whichever thread made them
_FEW = 24  # columns (tokens, or pixels of all images) that fill too little of the kernel's vectors
_SMALL = 2_000_000  # columns x weights, which take PyTorch about 50 us: a call of the kernel costs 20 by itself


def with_sparse_products(model: nn.Module) -> nn.Module:
    """A copy of the model, as it is now, whose linear layers and convolutions skip their zeros where that is faster.

    Units that the zeros have emptied are removed where the model says how (`remove_dead_units`).
    On a CUDA device zeros in a pattern are skipped, by other kernels: see `_cuda_products`, whose errors those are.
    UsageError: not float32 on the CPU, or no compiler (see `native.load`).
    """
    if next(model.parameters()).device.type == "cuda":
        from raysparse.models import _cuda_products

        return _cuda_products.with_sparse_products(model)
    check(model)
    found, memory = copy.deepcopy(model), Memory()
    if remove := getattr(found, "remove_dead_units", None):
        remove()
    for owner in list(found.modules()):
        for name, layer in owner.named_children():
            if supported(layer) and (product := SparseProduct(layer, memory)).pays:
                product.lay_out()
                setattr(owner, name, product)
    return found


def check(model: nn.Module) -> None:
    """UsageError as above."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        kind = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
        raise UsageError(f"it computes float32 on the CPU (--device cpu), the model is {kind}")
    native.load(pairs.SOURCE)


def worth_it(layer: nn.Module, x: Tensor) -> bool:
    """Whether x is one that the layer takes, and its columns fill the kernel's vectors and take longer than its call.

    Any other is the layer's own, with PyTorch's words where it does not fit: the kernel would read beside it.
    """
    weight, images = cast(Tensor, layer.weight), isinstance(layer, nn.Conv2d)
    if x.device.type != "cpu" or x.dim() < 1 or (images and x.dim() != 4):
        return False
    inputs = x.shape[1 if images else -1]
    columns = x.numel() // max(inputs, 1)
    return inputs == weight.shape[1] and columns >= _FEW and columns * weight.numel() >= _SMALL


def supported(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether the kernel computes what the layer does."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if type(layer) is nn.Conv2d:
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("starts", "offsets", "values", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "block", "pairs", "tile")),
    ]


class _Images(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("count", "channels", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("kernel_height", "kernel_width", "down", "across", "by_token")),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("weights", ctypes.c_int64), ("groups", ctypes.c_int64)]


class _Matrix(ctypes.Structure):
    _fields_ = [("columns", ctypes.c_void_p), ("row", ctypes.c_int64), ("pair", ctypes.c_int64)]


class Kernel:
    """The compiled products with a layer's weight, of `shape` [O, I] or [O, I, height, width], under a mask.

    Not thread-safe. memory: shared by layers. turned: with the weight turned, as dx is made: [I, O], its window turned
    half round. in_pairs: in bfloat16, O and I even; gradients are for a kernel of single weights. in_blocks: of pairs,
    by AMX, with `last_values` only; O and I by sixteens. `count` and then `lay_out` take over a mask; `used` weights or
    pairs of it are walked.
    """

    def __init__(
        self,
        shape: Sequence[int],
        memory: Memory,
        *,
        turned: bool = False,
        in_pairs: bool = False,
        in_blocks: bool = False,
    ) -> None:
        self._library = native.load(pairs.SOURCE)
        self._width = int(self._library.raysparse_width())
        self._deep = int(self._library.raysparse_deep())
        self._block = int(self._library.raysparse_features_in_cache())  # inputs that are walked before the next ones
        in_pairs = in_pairs or in_blocks
        self._in_pairs, self._in_blocks = in_pairs, in_blocks
        self._dtype = torch.bfloat16 if in_pairs else torch.float32
        self._shape, self._memory = tuple(shape), memory
        outputs, inputs, area = *shape[:2], math.prod(shape[2:])
        if turned:
            columns, row = inputs * area * torch.arange(outputs)[:, None] + torch.arange(area).flip(0), area
        else:
            columns, row = torch.arange(inputs * area).view(inputs, area), inputs * area
        self._outputs = inputs if turned else outputs
        self._columns = columns[:: 2 if in_pairs else 1].flatten().int()
        self._inputs = len(self._columns)
        self._matrix = _Matrix(self._columns.data_ptr(), row, int(columns[1, 0] - columns[0, 0]) if in_pairs else 0)
        if in_blocks:
            self._block = self._inputs
        self.edges, self.used = self._outputs + self._inputs, 0
        self.tile = 1  # outputs whose inputs are the same, as in blocks: the kernel loads those once then
        self._mask = self._starts = self._offsets = torch.empty(0)

    def count(self, mask: Tensor) -> None:
        """mask: bool, of the weight's shape; in_blocks also what else is in a block is counted and computed."""
        self._mask = (pairs.whole_blocks(mask) if self._in_blocks else mask).contiguous()
        self.tile = _BLOCK_TILE if self._in_blocks else _TILE
        if not (self._in_blocks or self._call("tiled", self._mask)):
            self.tile = 1
        blocks = -(-self._inputs // self._block)
        self._starts = torch.zeros(blocks * (self._outputs // self.tile) + 1, dtype=torch.int32)
        self._call("counts", self._mask, self._starts[1:], torch.get_num_threads())
        self._starts = self._starts.cumsum(0, dtype=torch.int32)
        self.used = self.tile * int(self._starts[-1])

    def lay_out(self) -> None:
        """What was counted, as products walk it."""
        self._offsets = torch.empty(self.used // self.tile, dtype=torch.int32)
        self._call("offsets", self._mask, self._offsets, torch.get_num_threads())
        if not self._in_pairs:  # it tells which of two weights is one of the mask's
            self._mask = torch.empty(0)

    def values(self, weight: Tensor) -> Tensor:
        """The active weights in the kernel's order, float32 [used]. weight: whatever it was cast to since."""
        found = torch.empty(self.used)
        self._call("values", self._mask, weight.detach().float().contiguous(), found, torch.get_num_threads())
        return found

    def last_values(self, weight: Tensor) -> Tensor:
        """The same of weights that no longer change: the mask is dropped."""
        found = self.values(weight)
        self._mask = torch.empty(0)
        if self._in_blocks and len(self._shape) > 2:
            in_tiles = -(-self._starts.diff() // _BLOCK_TILE) * _BLOCK_TILE * _BLOCK_TILE
            packed, layer = torch.empty(int(in_tiles.sum())), self._packed(None, None, self._in_pairs)
            self._library.raysparse_pack_blocks(ctypes.byref(layer), _handed(found), _handed(packed))
            return packed
        return found

    def _call(self, name: str, *arguments: Tensor | int | _Sums) -> int:
        """Of raysparse_`name` for this layer and matrix."""
        layer = self._packed(None, None, self._in_pairs)
        return int(
            getattr(self._library, f"raysparse_{name}")(
                *(ctypes.byref(layer), ctypes.byref(self._matrix)), *map(_handed, arguments)
            )
        )

    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x: float32 or bfloat16 [..., inputs] -> float32, in pairs bfloat16 [..., outputs]"""
        y = x.new_empty(*x.shape[:-1], self._outputs, dtype=self._dtype)
        turned = x.dim() == 3 and x.mT.is_contiguous() and not x.is_contiguous()  # as attention gets an image's pixels
        if turned and not self._in_blocks:
            window = Window((1, 1), (1, 1), (0, 0))
            padded = self._padded(x.mT.unsqueeze(2), window)
            self._run("convolve", values, bias, ctypes.byref(window.images(padded, y, by_token=True)))
            return y
        x = pairs.of_features(x) if self._in_pairs else x.float().contiguous()
        tokens = ctypes.c_int64(y.numel() // self._outputs)
        self._run("linear", values, bias, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), tokens)
        return y

    def convolve(self, x: Tensor, values: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        """x: float32 or bfloat16 [B, C, H, W] -> float32, in pairs bfloat16 [B, outputs, ...]"""
        padded = self._padded(x, window)
        y = x.new_empty(len(x), self._outputs, *window.out(*padded.shape[2:]), dtype=self._dtype)
        self._run("convolve", values, bias, ctypes.byref(window.images(padded, y)))
        return y

    def _padded(self, x: Tensor, window: Window) -> Tensor:
        """As the kernel takes images."""
        return pairs.of_channels(self._library, x, window.padding) if self._in_pairs else window.padded(x.float())

    def linear_gradients(self, x: Tensor, dy: Tensor) -> Tensor:
        """Of the weight, float32 of its shape, 0 where it is not active. x, dy: contiguous, both float32 or both
        bfloat16, of even numbers of inputs and outputs then."""
        tokens = x.numel() // self._inputs
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(dy.data_ptr()), ctypes.c_int64(tokens))
        return self._gradients("linear", tokens, dy.dtype, *pointers)

    def convolve_gradients(self, x: Tensor, dy: Tensor, window: Window) -> Tensor:
        """The same of a convolution's. dy: contiguous."""
        padded = window.padded(x)
        columns = dy.numel() // self._outputs
        return self._gradients("convolve", columns, dy.dtype, ctypes.byref(window.images(padded, dy)))

    def _gradients(self, name: str, columns: int, dtype: torch.dtype, *arguments: object) -> Tensor:
        halves, threads = dtype == torch.bfloat16, torch.get_num_threads()
        groups = min(_GROUPS, -(-columns // (2 * self._deep if halves else self._deep)))
        values = torch.zeros(groups, self.used)
        sums = _Sums(values.data_ptr(), self.used, groups)
        getattr(self._library, f"raysparse_{name}_gradients")(
            *(ctypes.byref(self._packed(None, None, halves)), *arguments, ctypes.byref(sums)),
            *(self._scratch(self._deep), ctypes.c_int32(threads)),
        )
        found = torch.zeros(self._shape)
        self._call("spread", sums, found, threads)
        return found

    def _run(self, name: str, values: Tensor, bias: Tensor | None, *arguments: object) -> None:
        bias = values.new_zeros(self._outputs) if bias is None else bias.detach().float()
        packed, threads = self._packed(values, bias, self._in_pairs), ctypes.c_int32(torch.get_num_threads())
        getattr(self._library, f"raysparse_{name}")(
            ctypes.byref(packed), *arguments, self._scratch(self._width), threads
        )

    def _packed(self, values: Tensor | None, bias: Tensor | None, halves: bool) -> _Layer:
        tensors = (self._starts, self._offsets, values, bias)
        sizes = (self._inputs, self._outputs, self._block, halves, self.tile)
        return _Layer(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), *sizes)

    def _scratch(self, columns: int) -> ctypes.c_void_p:
        size = 4 * torch.get_num_threads() * (self._inputs + self._outputs) * columns
        return ctypes.c_void_p(self._memory.at_least(size))


def _handed(argument: Tensor | int | _Sums) -> Any:
    """As C takes it."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.byref(argument)


class Window(NamedTuple):
    """How a convolution looks at its images."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @classmethod
    def of_layer(cls, layer: nn.Conv2d) -> Window:
        assert not isinstance(layer.padding, str)  # see supported
        return cls(layer.kernel_size, layer.stride, layer.padding)

    def padded(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H and W padded], contiguous"""
        up, side = self.padding
        return F.pad(x, (side, side, up, up)).contiguous()

    def out(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what comes out of a padded image."""
        return (height - self.kernel[0]) // self.stride[0] + 1, (width - self.kernel[1]) // self.stride[1] + 1

    def images(self, padded: Tensor, y: Tensor, *, by_token: bool = False) -> _Images:
        """y: contiguous, by_token [B, H W, outputs]."""
        pointers, (count, channels, *size) = (padded.data_ptr(), y.data_ptr()), padded.shape
        if self.kernel == self.stride == (1, 1):  # rows end to end: no run of pixels ends early
            size = [1, size[0] * size[1]]
        return _Images(*pointers, count, channels, *size, *self.out(*size), *self.kernel, *self.stride, by_token)


def _kernel_of(weight: Tensor, memory: Memory) -> tuple[Kernel, bool]:
    """That of a layer's last weight, and whether it is faster than the layer."""
    used = weight != 0
    if pairs.in_blocks(weight):
        kernel = Kernel(weight.shape, memory, in_blocks=True)
        kernel.count(used)
        if _BLOCKS.of(kernel) < weight.numel():
            return kernel, not used.all()
    in_pairs = pairs.used(weight)
    kernel = Kernel(weight.shape, memory, in_pairs=in_pairs)
    kernel.count(used)
    spent = (_PAIRS if in_pairs else _COSTS).of(kernel)
    return kernel, not used.all() and spent * _cpu.dense_speed() < weight.numel()


class SparseProduct(nn.Module):
    """forward(x), after `lay_out`, as the nn.Linear or nn.Conv2d that it stands for, in float32, no gradients.

    Made under autocast to bfloat16 it computes in that where the CPU can; sums stay float32. A weight that is 0 takes
    no part: an input that is not finite is not multiplied with it (in bfloat16 only where a pair's weights are both 0).
    Runs on torch.get_num_threads() threads, how many changes nothing; few columns are the layer's own.
    """

    def __init__(self, layer: nn.Module, memory: Memory) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        self.layer = layer
        weight = layer.weight.detach()
        self._window = Window.of_layer(layer) if isinstance(layer, nn.Conv2d) else None
        self._kernel, self.pays = _kernel_of(weight, memory)
        self._values = torch.empty(0)

    def lay_out(self) -> None:
        """Take over the weights as the kernel walks them: costs more than to tell whether that pays."""
        self._kernel.lay_out()
        self._values = self._kernel.last_values(self.layer.weight)

    @property
    def weight(self) -> Tensor:
        """Of the layer it stands for."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x, bias = x.detach(), self.layer.bias
        if not worth_it(self.layer, x):
            return self._dense(x)
        if self._window:
            return self._kernel.convolve(x, self._values, bias, self._window)
        return self._kernel.linear(x, self._values, bias)

    @torch.no_grad()
    def _dense(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            found: Tensor = self.layer(x.float())
            return found

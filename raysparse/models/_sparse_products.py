"""Linear layers and convolutions on a CPU through a compiled kernel that skips the weights that are 0: for sampling.

Any pattern of zeros is skipped, single ones too. What a layer computes is what the layer it stands for computes, to
rounding.
"""

from __future__ import annotations

import copy
import ctypes
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysparse import native
from raysparse.errors import UsageError
from raysparse.models import _cpu
from raysparse.models import _sparse_pairs as pairs
from raysparse.models._sparse_memory import Memory

# The kernel's time in that of a dense product per weight and column: so much for each active weight, by itself or in
# tiles (`tiled`; not measured on Intel), and so much for each input and output, which are laid out anew. Fitted to
# linear layers of 64 to 1,536 features and convolutions of 32 to 256 channels. Times faster at density .6, .5, .25, .1:
# 512 x 1,536 is .93, 1.1, 1.6 to 1.9, 3.5 (intel), 1.28, 1.52, 3.1, 5.2 (amd), 1.15, 1.36, 2.4, 4.5 (narrow); a 3x3
# convolution of 256 channels .88, 1.02, 1.7, 2.7; 1.01, 1.23, 1.9, 3.4; 1.06, 1.24, 2.2, 4.1; one of 32 at .5 and .1
# .82, 1.35; .90, 1.6; 1.01, 2.0. By blocks of 16 512 x 1,536 is at .7, .5, .25, .1 1.48, 2.0, 3.7, 6.5 (amd; without
# tiles 1.26, 1.6, 2.9, 5.1), 1.36, 1.8, 3.1, 5.6 (narrow).
_COSTS = {"intel": (1.75, 1.75, 12), "amd": (1.35, 0.95, 18), "narrow": (1.5, 1.13, 13)}
_ACTIVE, _TILED, _LAID_OUT = _COSTS[_cpu.KIND]
# Of pairs in bfloat16, on the EPYC. Times faster than dense in bfloat16 at density .5, .25, .1, single weights; blocks:
# 512 x 1,536 is 1.03, 1.6, 3.0; 1.9, 3.2, 5.1; a 3x3 convolution of 256 channels .93, 1.4, 2.7.
_PAIR, _PAIR_TILED, _PAIRS_LAID_OUT = 1.3, 0.95, 20
_TILE = 4  # see products.cpp
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
            if _takes(layer):
                setattr(owner, name, SparseProduct(layer, memory))
    return found


def check(model: nn.Module) -> None:
    """UsageError as above."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        kind = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
        raise UsageError(f"it computes float32 on the CPU (--device cpu), the model is {kind}")
    native.load(pairs.SOURCE)


def worth_it(columns: int, weight: Tensor) -> bool:
    """Whether so many columns fill the kernel's vectors and take longer than its call."""
    return columns >= _FEW and columns * weight.numel() >= _SMALL


def supported(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether the kernel computes what the layer does."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if type(layer) is nn.Conv2d:
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _takes(layer: nn.Module) -> bool:
    """Whether it does so, and faster."""
    if not supported(layer):
        return False
    used = layer.weight != 0
    if used.all():
        return False
    in_pairs = pairs.used(used)
    rows = pairs.of_weight(used).any(2) if in_pairs else used.flatten(1)
    single, in_tiles, laid_out = (_PAIR, _PAIR_TILED, _PAIRS_LAID_OUT) if in_pairs else (_ACTIVE, _TILED, _LAID_OUT)
    cost = (in_tiles if tiled(rows) else single) * int(rows.count_nonzero()) + laid_out * sum(rows.shape)
    return cost * _cpu.dense_speed() < used.numel()


def tiled(used: Tensor) -> bool:
    """bool [O, I]: whether each four outputs take the same inputs, as in blocks; the kernel loads those once then."""
    return len(used) % _TILE == 0 and bool((used.view(-1, _TILE, used.shape[1]) == used[::_TILE, None]).all())


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("starts", "offsets", "values", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "block", "pairs", "tiled")),
    ]


class _Images(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("count", "channels", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("kernel_height", "kernel_width", "down", "across", "by_token")),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("weights", ctypes.c_int64), ("groups", ctypes.c_int64)]


class Kernel:
    """The compiled products with a weight [outputs, inputs] under a mask. Not thread-safe. memory: shared by layers.

    in_pairs: in bfloat16; the weight, its mask and so on are then [outputs, inputs / 2, 2] (`pairs.of_weight`). Its
    gradients are for a kernel of single weights.
    """

    def __init__(self, inputs: int, outputs: int, memory: Memory, *, in_pairs: bool = False) -> None:
        self._library = native.load(pairs.SOURCE)
        self._width = int(self._library.raysparse_width())
        self._deep = int(self._library.raysparse_deep())
        self._block = int(self._library.raysparse_features_in_cache())  # inputs that are walked before the next ones
        self._in_pairs = in_pairs
        self._dtype = torch.bfloat16 if in_pairs else torch.float32
        self._inputs, self._outputs, self._memory = inputs // 2 if in_pairs else inputs, outputs, memory
        self._tile = 1  # outputs whose inputs are the same
        self._starts = self._offsets = self._places = self._active = torch.empty(0)

    def lay_out(self, mask: Tensor, places: Tensor) -> None:
        """mask: bool, of the weight's shape; places: int64, likewise, where in the layer's weight each one lies."""
        padded, blocks = -self._inputs % self._block, -(-self._inputs // self._block)

        def by_block(numbers: Tensor) -> Tensor:
            rows = F.pad(numbers, (0, 0) * (numbers.dim() - 2) + (0, padded))
            return rows.view(len(rows), blocks, self._block, *rows.shape[2:]).transpose(0, 1)

        rows = mask.any(2) if self._in_pairs else mask
        self._tile = _TILE if tiled(rows) else 1
        used = by_block(rows[:: self._tile])

        def in_order(numbers: Tensor) -> Tensor:
            """Those of the weights, or pairs, that are used, as the kernel walks them."""
            found = by_block(numbers)
            by_tile = found.reshape(blocks, -1, self._tile, *found.shape[2:])
            return by_tile.transpose(2, 3)[used].flatten(0, 1)

        self._starts = torch.zeros(used[:, :, 0].numel() + 1, dtype=torch.int32)
        self._starts[1:] = used.sum(2).flatten().cumsum(0)
        self._offsets = (used.nonzero()[:, 2] * (4 * self._width)).int()
        self._places = in_order(places).int()  # found with them in a third of the time that it takes with int64
        if self._in_pairs:
            self._active = in_order(mask)

    def values(self, weight: Tensor) -> Tensor:
        """The active weights in the kernel's order."""
        found = weight.flatten().index_select(0, self._places.flatten())
        return pairs.of_features(found.view(-1, 2) * self._active).squeeze(1) if self._in_pairs else found

    def last_values(self, weight: Tensor) -> Tensor:
        """The same of weights that no longer change: what finds them, as large as they are, is dropped."""
        found = self.values(weight)
        self._places = self._active = torch.empty(0)
        return found

    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x: float32 or bfloat16 [..., inputs] -> float32, in pairs bfloat16 [..., outputs]"""
        y = x.new_empty(*x.shape[:-1], self._outputs, dtype=self._dtype)
        if x.dim() == 3 and x.mT.is_contiguous() and not x.is_contiguous():  # as attention gets an image's pixels
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
        """Of the weights, float32 [outputs, inputs], 0 where they are not active. x, dy: contiguous, both float32 or
        both bfloat16, of even numbers of inputs and outputs then."""
        tokens = x.numel() // self._inputs
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(dy.data_ptr()), ctypes.c_int64(tokens))
        return self._gradients("linear", tokens, dy.dtype, *pointers)

    def convolve_gradients(self, x: Tensor, dy: Tensor, window: Window) -> Tensor:
        """The same of a convolution's, [outputs, inputs]. dy: contiguous."""
        padded = window.padded(x)
        columns = dy.numel() // self._outputs
        return self._gradients("convolve", columns, dy.dtype, ctypes.byref(window.images(padded, dy)))

    def _gradients(self, name: str, columns: int, dtype: torch.dtype, *arguments: object) -> Tensor:
        halves = dtype == torch.bfloat16
        groups = min(_GROUPS, -(-columns // (2 * self._deep if halves else self._deep)))
        sums = torch.zeros(groups, len(self._places))
        handed = _Sums(sums.data_ptr(), len(self._places), groups)
        threads = ctypes.c_int32(torch.get_num_threads())
        getattr(self._library, f"raysparse_{name}_gradients")(
            *(ctypes.byref(self._packed(sums, None, halves)), *arguments, ctypes.byref(handed)),
            *(self._scratch(self._deep), threads),
        )
        found = torch.zeros(self._outputs * self._inputs)
        found.index_copy_(0, self._places.long(), sums.sum(0))
        return found.view(self._outputs, self._inputs)

    def _run(self, name: str, values: Tensor, bias: Tensor | None, *arguments: object) -> None:
        bias = values.new_zeros(self._outputs) if bias is None else bias.detach()
        packed, threads = self._packed(values, bias, self._in_pairs), ctypes.c_int32(torch.get_num_threads())
        getattr(self._library, f"raysparse_{name}")(
            ctypes.byref(packed), *arguments, self._scratch(self._width), threads
        )

    def _packed(self, values: Tensor, bias: Tensor | None, halves: bool) -> _Layer:
        pointers = (self._starts.data_ptr(), self._offsets.data_ptr(), values.data_ptr())
        sizes = (self._inputs, self._outputs, self._block, halves, self._tile > 1)
        return _Layer(*pointers, None if bias is None else bias.data_ptr(), *sizes)

    def _scratch(self, columns: int) -> ctypes.c_void_p:
        size = 4 * torch.get_num_threads() * (self._inputs + self._outputs) * columns
        return ctypes.c_void_p(self._memory.at_least(size))


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


class SparseProduct(nn.Module):
    """forward(x) as the nn.Linear or nn.Conv2d that it stands for, in float32, no gradients.

    Made under autocast to bfloat16 it computes in that where the CPU can; sums stay float32. A weight that is 0 takes
    no part: an input that is not finite is not multiplied with it (in bfloat16 only where a pair's weights are both 0).
    Runs on torch.get_num_threads() threads; what comes out does not depend on how many.
    """

    def __init__(self, layer: nn.Module, memory: Memory) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        self.layer = layer
        weight = layer.weight.detach()
        places = torch.arange(weight.numel()).view(weight.shape)
        in_pairs = pairs.used(weight)
        rows = [pairs.of_weight(part) if in_pairs else part.flatten(1) for part in (weight != 0, places)]
        self._kernel = Kernel(weight[0].numel(), len(weight), memory, in_pairs=in_pairs)
        self._kernel.lay_out(*rows)
        self._values = self._kernel.last_values(weight)
        self._window = Window.of_layer(layer) if isinstance(layer, nn.Conv2d) else None

    @property
    def weight(self) -> Tensor:
        """Of the layer it stands for."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x, bias = x.detach(), self.layer.bias
        if not worth_it(x.numel() // x.shape[1 if self._window else -1], self.layer.weight):
            return self._dense(x)
        if self._window:
            return self._kernel.convolve(x, self._values, bias, self._window)
        return self._kernel.linear(x, self._values, bias)

    @torch.no_grad()
    def _dense(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            found: Tensor = self.layer(x.float())
            return found

"""Which weights can be masked, and masks with an exact number of ones."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from raysparse.errors import UsageError

ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
RECURRENT = ("weight_ih", "weight_hh")
_COUNTED = 1024  # flags that are counted in a row
_SAMPLE = 61  # each so many-th score is looked at first; a divisor of a layer's width would see few of its inputs
_SAMPLED_FROM = 1 << 15  # scores, of which some 500 tell where a rank lies
Numbers = np.ndarray[Any, Any]
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes; the sign widens -1 to all bits


def maskable(model: nn.Module, keep_dense: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters that sparsity counts, by name, in the model's order.

    They are the weights with ndim >= 2 of convolutions and linear layers, the input projections of
    nn.MultiheadAttention, and every weight_ih* / weight_hh* (GRU, LSTM, RNN, their cells, and own modules that use
    these names). Norms, biases and embeddings are dense, and so is a linear layer that shares its weight with an
    embedding, and whatever does not require a gradient.
    keep_dense: names of modules (all below them) or parameters to leave out, beside the model's own `keep_dense`.
    UsageError: a name in keep_dense that the model lacks, a lazy or parametrized weight.
    """
    model = unwrapped(model)
    dense = set(keep_dense) | set(getattr(model, "keep_dense", ()))
    _check_names(model, dense)
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    found: dict[str, nn.Parameter] = {}
    seen = set(embedded)
    for prefix, module in model.named_modules():
        for leaf, weight in _weights(prefix, module):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if id(weight) in seen or not weight.requires_grad or not weight.is_floating_point() or weight.ndim < 2:
                continue
            seen.add(id(weight))
            if not any(name == kept or name.startswith(f"{kept}.") for kept in dense):
                found[name] = weight
    return found


def shapes(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes [n_out, n_in, *kernel] that allocation sees: each weight's, or what `model.allocation_shapes` says.

    A model declares one where its layer stands for another kind: diffusers has a Linear where Latent Diffusion has a
    convolution of kernel 1, which ERK counts. ValueError: a declared shape of another size.
    """
    declared = getattr(unwrapped(model), "allocation_shapes", {})
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in found.keys() & declared.keys():
        if math.prod(declared[name]) != math.prod(found[name]):
            raise ValueError(f"{name} has shape {found[name]}, allocation_shapes says {tuple(declared[name])}")
        found[name] = tuple(declared[name])
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile: names carry no wrapper's prefix."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def highest(scores: Tensor, count: int, candidates: Tensor) -> Tensor:
    """Mask of exactly the `count` highest-scored candidates; ties go to the lower index, NaN comes last.

    scores: floating point, any shape; candidates: bool, the same shape, at least `count` of them. Returns bool, the
    same shape and memory format. Linear time: one selection of the threshold, no sort. ValueError: fewer candidates;
    on a GPU, which is not waited for, only where there are fewer scores.
    """
    flat, allowed = scores.detach().reshape(-1), candidates.reshape(-1)
    there = int(np.count_nonzero(allowed.numpy())) if on_host(flat) else allowed.numel()
    if not 0 <= count <= there:
        raise ValueError(f"{count} of {there} candidates asked for")
    if count == 0:
        return torch.zeros_like(candidates)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    found = (_highest_numpy if on_host(flat) else _highest_torch)(flat, count, allowed)
    found = found.view(candidates.shape)
    return found if found.stride() == candidates.stride() else torch.empty_like(candidates).copy_(found)


def lowest(scores: Tensor, count: int, candidates: Tensor) -> Tensor:
    """The same for the lowest scores."""
    return highest(scores.neg(), count, candidates)


def lowest_up_to(scores: Tensor, count: Tensor, most: int, candidates: Tensor) -> Tensor:
    """The same for a count that a GPU is not asked for: int64 [], in [0, most]."""
    if on_host(scores):
        return lowest(scores, int(count), candidates)
    allowed = candidates.reshape(-1)
    flat = _comparable(scores.detach().reshape(-1).neg(), allowed)
    threshold = flat.topk(max(1, most)).values.gather(0, (count - 1).clamp(min=0)[None])
    return _best(flat, threshold, count, allowed).view(candidates.shape)  # of 0: nothing is above the highest


def on_host(tensor: Tensor) -> bool:
    """Whether choices in it are made by numpy: on a GPU they are not waited for."""
    return tensor.device.type == "cpu"


def all_bits(mask: Tensor) -> Tensor:
    """int8: -1 (all bits) where the mask is true, 0 elsewhere; what `zero_outside` takes."""
    return mask.view(torch.int8).neg()


@torch.no_grad()
def zero_outside(tensor: Tensor, bits: Tensor) -> None:
    """Zero a floating-point tensor in place, inf and NaN too, where `bits` (from `all_bits`, same shape) is 0.

    A bitwise and on the numbers' bits: exact like masked_fill_, at the speed of a multiplication, a byte per weight.
    PyTorch's first widens all of `bits`: of .5 to 4 million in no cache it takes up to .65 to .75 ms a million on one
    thread, numpy's .43 to .49. But numpy's has one thread only: the 35.7M gradients of the U-Net take it 15 to 16 ms,
    PyTorch's two threads 9.5 (medians).
    """
    signed = tensor.detach().view(SIGNED[tensor.element_size()])
    if on_host(signed) and torch.get_num_threads() == 1:
        numbers = signed.numpy()
        np.bitwise_and(numbers, bits.numpy(), out=numbers)
    else:
        signed.bitwise_and_(bits)


def true_indices(mask: Tensor) -> Tensor:
    """int64, ascending: where a bool tensor is true, counted in row-major order whatever its memory format."""
    flat = mask.reshape(-1)
    # numpy's flatnonzero takes .4 ms for a million, torch.nonzero 10 ms on two busy cores
    return torch.from_numpy(np.flatnonzero(flat.numpy())) if flat.device.type == "cpu" else flat.nonzero().squeeze(1)


@torch.no_grad()
def put(tensor: Tensor, index: Tensor, values: Tensor | float) -> Tensor:
    """Tensor.put_ for any memory format; put_ itself is refused under torch.use_deterministic_algorithms."""
    if tensor.is_contiguous():
        tensor.view(-1)[index] = values
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = values  # 5 times slower
    return tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operations on this thread alone.

    A mask is made by hundreds of operations of a tenth of a millisecond. On cores shared with other trials each waits
    for its slower half: 35.7M weights took 3 to 7 s on two threads under a load of 10, .7 to 2.6 s on one (.3 s idle).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _highest_numpy(scores: Tensor, count: int, allowed: Tensor) -> Tensor:
    """numpy's vectorised selection takes 1 ms for a million numbers, torch.kthvalue 13."""
    values, mask = scores.numpy(), allowed.numpy()
    chosen, index, left = _near(values, mask, count)
    among = values.take(index)  # 10 times faster than values[mask]
    among[np.isnan(among)] = -np.inf
    threshold = _nth_highest(among, left)
    higher = among > threshold
    chosen[index[higher]] = True
    ties = index[among == threshold]
    chosen[ties[: left - int(np.count_nonzero(higher))]] = True
    return torch.from_numpy(chosen)


def _highest_torch(scores: Tensor, count: int, allowed: Tensor) -> Tensor:
    """The same on any device, without waiting for it, in few kernels: an update is hundreds for each layer."""
    scores = _comparable(scores, allowed)
    return _best(scores, scores.topk(count, sorted=False).values.amin(), count, allowed)


def _comparable(scores: Tensor, allowed: Tensor) -> Tensor:
    """What is not allowed, or NaN, comes last."""
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).where(allowed, -torch.inf)


def _best(scores: Tensor, threshold: Tensor, count: int | Tensor, allowed: Tensor) -> Tensor:
    """What is above the threshold, and of what equals it the first ones up to the count."""
    above, ties = scores > threshold, (scores == threshold) & allowed
    return above | (ties & (_running_count(ties) <= count - above.sum()))


def _running_count(flags: Tensor) -> Tensor:
    """int32 [n]: how many of a bool [n] are true up to each place, on any device and under vmap.

    In rows, because of several vectors at once (vmap) CUDA's cumsum gives each to one block of threads, which walks it
    1,024 numbers at a time: 4 million of a layer of U-ViT large/2 in 4,096 turns.
    """
    padded = nn.functional.pad(flags, (0, -flags.numel() % _COUNTED)).view(-1, _COUNTED)
    within = padded.cumsum(1, dtype=torch.int32)
    totals = within[:, -1]
    before = totals.cumsum(0, dtype=torch.int32) - totals
    return (within + before[:, None]).flatten()[: flags.numel()]


def _nth_highest(values: Numbers, count: int) -> Any:
    """The `count`-th highest of a flat array without NaN.

    np.partition takes 20 times longer where most values are equal, as the magnitudes of zero-initialised layers and
    the gradients of unused ones are. Those are the extremes, which are counted first.
    """
    low, high = values.min(), values.max()
    at_low, at_high = int(np.count_nonzero(values == low)), int(np.count_nonzero(values == high))
    if count <= at_high:
        return high
    if count > values.size - at_low:
        return low
    if 8 * (at_low + at_high) > values.size:
        values, count = values[(values > low) & (values < high)], count - at_high
    place = values.size - count
    return np.partition(values, place)[place]


def _near(values: Numbers, mask: Numbers, count: int) -> tuple[Numbers, Numbers, int]:
    """Which of the `count` highest of `mask` are surely so, where those lie that may be, and how many of them are.

    Bounds are those of four standard deviations of a sample's rank: some 3 % of millions lie between. All may be where
    the bounds do not hold, and where there are few. NaN lies outside all bounds.
    """
    if values.size >= _SAMPLED_FROM:
        sample = np.sort(np.nan_to_num(values[::_SAMPLE][mask[::_SAMPLE]], nan=-np.inf, posinf=np.inf, neginf=-np.inf))
        rank = sample.size * (1 - count / int(np.count_nonzero(mask)))
        margin = 2 * math.sqrt(sample.size) + 1
        low = sample[int(rank - margin)] if rank > margin else -np.inf
        high = sample[int(rank + margin)] if rank + margin < sample.size else np.inf
        above, between = values > high, values >= low
        above &= mask
        between &= mask
        between ^= above
        index, sure = np.flatnonzero(between), int(np.count_nonzero(above))
        if sure < count <= sure + index.size:
            return above, index, count - sure
    return np.zeros_like(mask), np.flatnonzero(mask), count


def _weights(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    own = [(leaf, weight) for leaf, weight in module._parameters.items() if weight is not None]
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        if getattr(module, "parametrizations", None) or "weight" not in module._parameters:
            raise UsageError(f"the weight of {prefix!r} is parametrized and has no values of its own to mask.")
        own = [(leaf, weight) for leaf, weight in own if leaf == "weight"]
    elif isinstance(module, nn.MultiheadAttention):
        own = [(leaf, weight) for leaf, weight in own if leaf in ATTENTION]
    else:
        own = [(leaf, weight) for leaf, weight in own if leaf.startswith(RECURRENT)]
    for leaf, weight in own:
        if isinstance(weight, UninitializedParameter):
            raise UsageError(f"layer {prefix!r} is lazy and has no shape yet: run the model once before it is masked.")
        yield leaf, weight


def _check_names(model: nn.Module, names: Iterable[str]) -> None:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in sorted(set(names) - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"keep_dense names {name!r}, which is no module or parameter of the model.{hint}")

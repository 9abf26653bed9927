"""How many weights each layer keeps: uniform, ER and ERK, with one epsilon and an exact total. Torch-free.

ER gives a layer the density ε (n_in + n_out) / (n_in n_out) (Mocanu et al. 2018), ERK counts the kernel too,
ε (n_in + n_out + w + h) / (n_in n_out w h) (Evci et al. 2020); for a Linear or a GRU the two are the same. One ε serves
all layers. A layer whose density would exceed 1 is frozen dense and ε is solved again for the rest.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from raysparse.errors import UsageError, unknown

Shape = Sequence[int]


def _uniform(shape: Shape) -> float:
    return float(math.prod(shape))


def _er(shape: Shape) -> float:
    return (shape[0] + shape[1]) * float(math.prod(shape[2:]))


def _erk(shape: Shape) -> float:
    return float(sum(shape))


# name -> a layer's active weights at ε = 1, from its shape [n_out, n_in, *kernel]; its density is this over its size
ALLOCATIONS: dict[str, Callable[[Shape], float]] = {"uniform": _uniform, "er": _er, "erk": _erk}


def counts(
    shapes: Mapping[str, Shape],
    *,
    sparsity: float,
    allocation: str = "erk",
    groups: Sequence[Sequence[str]] = (),
    units: Mapping[str, int] | None = None,
    dense: Collection[str] = (),
) -> dict[str, int]:
    """Active weights of every layer; they sum to round((1 - sparsity) x all weights), exactly where `units` are 1.

    shapes: name -> [n_out, n_in, *kernel]. sparsity in [0, 1). groups: names that are allocated as one tensor, joined
    along n_out (q, k, v). units: name -> weights that are active together, a divisor of the layer's size; a count is a
    multiple of it. dense: layers that keep all weights. Each layer keeps at least one unit: a layer with none would cut
    the model in two.
    UsageError: sparsity out of range, unknown allocation or layer, no layer, fewer weights left than layers need.
    """
    check_sparsity(sparsity)
    check_allocation(allocation)
    if not shapes:
        raise UsageError("there is no layer to allocate weights to.")
    if dense or (units and any(size > 1 for size in units.values())):
        return _whole_units(shapes, sparsity, allocation, groups, units or {}, dense)
    joined = _joint(shapes, groups)
    sizes = [sum(math.prod(shapes[name]) for name in names) for names in joined]
    total = round((1 - sparsity) * sum(sizes))
    if total < len(shapes):
        raise UsageError(
            f"sparsity {sparsity} leaves {total} of {sum(sizes)} weights for {len(shapes)} layers; each layer keeps "
            f"at least one. Lower the sparsity."
        )
    demands = [ALLOCATIONS[allocation](_joined([shapes[name] for name in names])) for names in joined]
    shares = _apportion(_capped_shares(demands, sizes, total), sizes, [len(names) for names in joined], total)
    result: dict[str, int] = {}
    for names, size, count in zip(joined, sizes, shares, strict=True):
        members = [math.prod(shapes[name]) for name in names]
        parts = [count * member / size for member in members]
        result.update(zip(names, _apportion(parts, members, [1] * len(names), count), strict=True))
    return {name: result[name] for name in shapes}


def densities(
    shapes: Mapping[str, Shape],
    *,
    sparsity: float,
    allocation: str = "erk",
    groups: Sequence[Sequence[str]] = (),
) -> dict[str, float]:
    """Share of active weights of every layer, in (0, 1]; arguments and errors as in `counts`."""
    allocated = counts(shapes, sparsity=sparsity, allocation=allocation, groups=groups)
    return {name: count / math.prod(shapes[name]) for name, count in allocated.items()}


def check_sparsity(sparsity: float) -> None:
    """UsageError where the sparsity is outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity is {sparsity}; it is the share of zero weights and must be in [0, 1).")


def check_allocation(allocation: str) -> None:
    """UsageError, with the nearest name, where the allocation is unknown."""
    if allocation not in ALLOCATIONS:
        raise UsageError(unknown("allocation", str(allocation), ALLOCATIONS))


def _joint(shapes: Mapping[str, Shape], groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The layers as allocation sees them: each group, and each other layer alone, in the order of `shapes`."""
    group_of: dict[str, int] = {}
    for index, group in enumerate(groups):
        for name in group:
            if name not in shapes:
                close = difflib.get_close_matches(name, shapes, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise UsageError(f"allocation group {index} names {name!r}, which is no masked layer.{hint}")
            if name in group_of:
                raise UsageError(f"layer {name!r} is in allocation groups {group_of[name]} and {index}, not in one.")
            group_of[name] = index
        if len({tuple(shapes[name][1:]) for name in group}) > 1:
            raise UsageError(f"allocation group {index} joins layers along n_out, but other sizes differ: {group}.")
    joint: dict[object, list[str]] = {}
    for name in shapes:
        joint.setdefault(group_of.get(name, name), []).append(name)
    return list(joint.values())


def _whole_units(
    shapes: Mapping[str, Shape],
    sparsity: float,
    allocation: str,
    groups: Sequence[Sequence[str]],
    units: Mapping[str, int],
    dense: Collection[str],
) -> dict[str, int]:
    """`counts` where weights are active in units, or some layers stay dense."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round((1 - sparsity) * sum(sizes.values()))
    free = [name for name in shapes if name not in dense]
    full = sum(sizes[name] for name in dense)
    left, needed = total - full, sum(units.get(name, 1) for name in free)
    if left < needed:
        raise UsageError(
            f"sparsity {sparsity} leaves {total} of {sum(sizes.values())} weights, but {full} are in "
            f"layers that stay dense and each of the other {len(free)} keeps at least one unit of its pattern, "
            f"{needed} weights in all. Lower the sparsity."
        )
    joined = _joint({name: shapes[name] for name in free}, [[n for n in group if n in free] for group in groups])
    joined_sizes = [sum(sizes[name] for name in names) for names in joined]
    demands = [ALLOCATIONS[allocation](_joined([shapes[name] for name in names])) for names in joined]
    wanted: dict[str, float] = {}
    for names, size, share in zip(joined, joined_sizes, _capped_shares(demands, joined_sizes, left), strict=True):
        wanted |= {name: share * sizes[name] / size for name in names}
    steps = {name: units.get(name, 1) for name in free}
    rounded = {n: min(sizes[n], max(steps[n], round(wanted[n] / steps[n]) * steps[n])) for n in free}
    _settle(rounded, wanted, steps, sizes, left)
    return {name: sizes[name] if name in dense else rounded[name] for name in shapes}


def _settle(
    counts: dict[str, int], wanted: Mapping[str, float], steps: Mapping[str, int], sizes: Mapping[str, int], total: int
) -> None:
    """Move single units until the sum is as near to `total` as one more cannot bring it: large units first.

    Of equal units the one whose layer is farthest from what it wants; so a layer of single weights settles the rest.
    """
    for step in sorted(set(steps.values()), reverse=True):
        names = [name for name in counts if steps[name] == step]
        while 2 * abs(missing := total - sum(counts.values())) > step:
            sign = 1 if missing > 0 else -1
            movable = [n for n in names if step <= counts[n] + sign * step <= sizes[n]]
            if not movable:
                break
            order = sorted(movable, key=lambda n: sign * (counts[n] - wanted[n]) / step)
            for name in order[: max(1, abs(missing) // step)]:
                counts[name] += sign * step


def _joined(shapes: Sequence[Shape]) -> Shape:
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


def _capped_shares(demands: Sequence[float], sizes: Sequence[int], total: int) -> list[float]:
    """ε x demand per layer, none above its size, summing to `total`: ε is solved again as layers become dense.

    A layer that becomes dense leaves weights over, so ε only grows and no frozen layer has to be thawed.
    """
    frozen: set[int] = set()
    while True:
        free = [index for index in range(len(sizes)) if index not in frozen]
        left = total - sum(sizes[index] for index in frozen)
        epsilon = left / sum(demands[index] for index in free) if free else 0.0
        over = {index for index in free if epsilon * demands[index] > sizes[index]}
        if not over:
            return [
                float(size) if index in frozen else epsilon * demand
                for index, (size, demand) in enumerate(zip(sizes, demands, strict=True))
            ]
        frozen |= over


def _apportion(shares: Sequence[float], sizes: Sequence[int], least: Sequence[int], total: int) -> list[int]:
    """Whole numbers near `shares`, least <= number <= size, summing to `total`; largest remainders go first."""
    numbers = [min(size, max(low, math.floor(s))) for s, size, low in zip(shares, sizes, least, strict=True)]
    while (missing := total - sum(numbers)) != 0:
        step = 1 if missing > 0 else -1
        order = sorted(range(len(shares)), key=lambda index: step * (numbers[index] - shares[index]))
        movable = [index for index in order if least[index] <= numbers[index] + step <= sizes[index]]
        for index in movable[: abs(missing)]:
            numbers[index] += step
    return numbers

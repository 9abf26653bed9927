"""SparseEngine: keeps a model sparse while any optimizer trains it, and changes its topology when an update is due."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn, optim

from raysparse import plugins
from raysparse.errors import UsageError
from raysparse.sparse import allocation as allocations
from raysparse.sparse.agreement import Agreement
from raysparse.sparse.criteria import CRITERIA, NEEDS_GRADIENT, Layer, random
from raysparse.sparse.masks import all_bits, highest, lowest, maskable, one_thread, shapes, unwrapped, zero_outside
from raysparse.sparse.method import Method
from raysparse.sparse.optimizer_state import Undo, clear, keeps_zeros
from raysparse.sparse.schedules import UpdateSchedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Where a setting is not given: the paper's values (PAPER.md 1). None as a default in the signature, so that a setting
# given to a method that does not have it is refused instead of ignored.
DEFAULTS: dict[str, Any] = {
    "sparsity": 0.9,
    "allocation": "erk",
    "prune_ratio": 0.5,
    "update_interval": 100,
    "prune_schedule": "constant",
    "update_end_step": None,
}
SETTING_OF = {"update_end_step": "update_end_fraction"}  # argument -> the setting's name where it is another


class SparseEngine:
    """Sparse training of `model` in four lines of a training loop:

        engine = SparseEngine(model, optimizer, method="rigl", sparsity=0.9)
        loss.backward(); engine.mask_gradients()
        clip_grad_norm_(...); optimizer.step()
        engine.after_step()

    `mask_gradients` is called once per optimizer step, on the final gradient: after the last accumulated backward,
    after the reduction over ranks (DDP has done it; the engine reduces nothing) and after `scaler.unscale_(optimizer)`,
    before clipping. With a GradScaler, a skipped step is told by its scale:

        scale = scaler.get_scale(); scaler.step(optimizer); scaler.update()
        engine.after_step(skipped=scaler.get_scale() < scale)

    Weights stay dense tensors with exact zeros, changed in place only. Masks, gradients and moments are zero at pruned
    positions after every call. With an optimizer that is not known to keep zeros (optimizer_state.KEEPS_ZEROS) the
    weights and moments are masked after each step as well.

    Arguments:
        method: a file of sparse/methods.
        sparsity: share of zeros over all maskable weights, in [0, 1). allocation: uniform, er or erk.
        prune_ratio: share of a layer's active weights that an update prunes, in (0, 1].
        update_interval: optimizer steps. prune_schedule: constant or cosine.
        update_end_step: no update at or after it; None: to the end.
        seed: of the first masks and of random growth; the same on all ranks.
        keep_dense: module or parameter names left dense, beside `model.keep_dense`.
        groups: lists of layers allocated as one, default `model.allocation_groups`.
        process_group: ranks whose masks must agree; default: that of a DDP model, else none.
    UsageError: a setting out of range or that the method does not have, nothing to mask, or an optimizer that holds
        none of the model's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        method: str = "rigl",
        sparsity: float | None = None,
        allocation: str | None = None,
        prune_ratio: float | None = None,
        update_interval: int | None = None,
        prune_schedule: str | None = None,
        update_end_step: int | None = None,
        seed: int = 0,
        keep_dense: Iterable[str] = (),
        groups: Sequence[Sequence[str]] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        given = {
            "sparsity": sparsity,
            "allocation": allocation,
            "prune_ratio": prune_ratio,
            "update_interval": update_interval,
            "prune_schedule": prune_schedule,
            "update_end_step": update_end_step,
        }
        plugin = plugins.load("methods", method)
        settings = _settings(method, plugin.SETTINGS, given)
        self.method = method
        self.seed = seed
        self.step = 0  # optimizer steps that were not skipped
        self.updates = 0  # topology updates
        self.replaced = 0  # connections that topology updates made where there was none
        self._method: Method = plugin.METHOD
        self._optimizer = optimizer
        self._mask_weights = not keeps_zeros(optimizer)
        self._agreement = Agreement.of(model, process_group)
        self._schedule = _schedule(settings) if self._method.dynamic else None
        self._gradients: dict[str, Tensor] = {}  # dense ones, held from mask_gradients to after_step of an update
        self._masked = False  # mask_gradients was called for the step that after_step closes
        self._weights: dict[str, nn.Parameter] = {}
        self._masks: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # active weights per layer, never changed
        self._bits: dict[str, Tensor] = {}  # the masks as every step needs them: masks.all_bits
        if self._method.sparse:
            self._weights = _weights_of(model, optimizer, keep_dense)
            groups = getattr(unwrapped(model), "allocation_groups", ()) if groups is None else groups
            self._counts = allocations.counts(
                shapes(model, self._weights),
                sparsity=settings["sparsity"],
                allocation=settings["allocation"],
                groups=groups,
            )
            masks = {name: self._first_mask(name) for name in self._weights}
            self._agreement.check(self.step, masks)
            self._impose(masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of the weight's shape, true where active; not to be written to.

        An update makes new tensors, so what was read here before stays as it was. Empty for the dense method.
        """
        return dict(self._masks)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all maskable weights, as achieved; 0 for the dense method."""
        total = sum(weight.numel() for weight in self._weights.values())
        return 1 - sum(self._counts.values()) / total if total else 0.0

    def layer_density(self) -> dict[str, float]:
        """Parameter name -> share of active weights, in (0, 1]."""
        return {name: self._counts[name] / weight.numel() for name, weight in self._weights.items()}

    @property
    def needs_dense_gradients(self) -> bool:
        """Whether the step at hand looks at the gradients of pruned weights: only an update that grows by them does."""
        due = self._schedule is not None and self._schedule.due(self.step + 1)
        return due and self._method.grow in NEEDS_GRADIENT

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, inf and NaN too; keep the dense ones first where growth needs them."""
        if self.needs_dense_gradients:
            self._gradients = {n: w.grad.detach().clone() for n, w in self._weights.items() if w.grad is not None}
        for name, weight in self._weights.items():
            if weight.grad is not None:
                zero_outside(weight.grad, self._bits[name])
        self._masked = True

    def after_step(self, skipped: bool = False) -> None:
        """Count the optimizer step and, where one is due, update the topology.

        skipped: the optimizer did not step (inf under AMP): nothing is counted, nothing changes.
        UsageError: mask_gradients was not called for this step, or another rank has other masks or failed.
        """
        gradients, self._gradients = self._gradients, {}
        masked, self._masked = self._masked, False
        if skipped:
            return
        if not masked:
            raise UsageError(
                "after_step() without mask_gradients(): call that after backward(), before optimizer.step()."
            )
        step = self.step + 1
        if self._mask_weights:
            self._clear_pruned()
        if self._schedule is not None and self._schedule.due(step):
            self._update(step, self._schedule.ratio(step), gradients)
        self.step = step

    @torch.no_grad()
    def apply_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero the pruned positions of an EMA shadow or any copy of the weights, in place.

        tensors: parameter name -> tensor; names that are not masked are left alone.
        UsageError: a masked parameter is not among them or has another shape.
        """
        for name, bits in self._bits.items():
            if name not in tensors:
                raise UsageError(f"there is no tensor for the masked parameter {name!r} to apply its mask to.")
            if tensors[name].shape != bits.shape:
                raise UsageError(f"{name!r} has shape {tuple(tensors[name].shape)}, its mask {tuple(bits.shape)}.")
            zero_outside(tensors[name], bits.to(tensors[name].device))

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside weights and optimizer: counters and masks (copies), no other objects."""
        return {
            "method": self.method,
            "seed": self.seed,
            "step": self.step,
            "updates": self.updates,
            "replaced": self.replaced,
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over masks and counters, then zero weights and moments outside the masks.

        Load the model and the optimizer first. UsageError, with nothing changed: other method or seed, other layers or
        shapes, or other counts of active weights than this engine's settings give.
        """
        masks = _checked_masks(self, state, self._counts)
        masks = {name: torch.empty_like(self._masks[name]).copy_(mask) for name, mask in masks.items()}
        self._gradients, self._masked = {}, False
        self._impose(masks)
        self.step, self.updates, self.replaced = state["step"], state["updates"], state["replaced"]

    def _first_mask(self, name: str) -> Tensor:
        weight = self._weights[name]
        everywhere = torch.ones_like(weight, dtype=torch.bool)
        if self._counts[name] == weight.numel():
            return everywhere
        return highest(random(Layer(name, weight, None, self.seed, 0)), self._counts[name], everywhere)

    def _update(self, step: int, ratio: float, gradients: Mapping[str, Tensor]) -> None:
        """One topology update: all new masks first, then agreement with the other ranks, then the change."""
        masks: dict[str, Tensor] = {}
        try:
            with one_thread():
                for name in self._weights:
                    masks[name] = self._new_mask(name, step, ratio, gradients.get(name))
        except Exception:
            self._agreement.give_up(step, len(self._weights))  # the other ranks raise instead of waiting for this one
            raise
        self._agreement.check(step, masks)
        self.replaced += self._replace(masks)
        self.updates += 1

    def _new_mask(self, name: str, step: int, ratio: float, gradient: Tensor | None) -> Tensor:
        """Prune a share of the layer's active weights, grow as many among all that are then inactive.

        As in the RigL paper (I not in θ \\ I_drop) and code, a connection just pruned can be grown again; it then was
        never away and keeps its weight and moments. So the method is also defined where fewer weights are inactive than
        are pruned. A layer that got no gradient is left as it is.
        """
        mask, weight = self._masks[name], self._weights[name]
        count = round(ratio * self._counts[name])
        prune, grow = self._method.prune, self._method.grow
        assert prune is not None
        assert grow is not None
        unused = grow in NEEDS_GRADIENT and gradient is None
        if count == 0 or unused or self._counts[name] == weight.numel():
            return mask
        layer = Layer(name, weight, gradient, self.seed, step)
        kept = mask & ~lowest(CRITERIA[prune](layer), count, mask)
        return kept | highest(CRITERIA[grow](layer), count, ~kept)

    def _replace(self, masks: dict[str, Tensor]) -> int:
        """Put new masks in place, zero what they prune, and return how many connections are new.

        A grown weight and its moments are 0 already: they are kept so while it is pruned.
        Whatever stops this half way, Ctrl-C too, all that was zeroed gets its values back before the error goes on.
        """
        self._clear_pruned()  # what user code may have written there
        undo = Undo()
        try:
            for name, mask in masks.items():
                if mask is not self._masks[name]:
                    undo.zero(self._optimizer, self._weights[name], self._masks[name] & ~mask)
            bits = {name: all_bits(mask) for name, mask in masks.items()}
        except BaseException:
            undo.restore()
            raise
        self._masks, self._bits = masks, bits
        return undo.positions  # as many are new as were pruned

    def _impose(self, masks: dict[str, Tensor]) -> None:
        """Put first or loaded masks in place and zero all that is outside them."""
        self._masks, self._bits = masks, {name: all_bits(mask) for name, mask in masks.items()}
        self._clear_pruned()

    def _clear_pruned(self) -> None:
        for name, weight in self._weights.items():
            clear(self._optimizer, weight, self._bits[name])


def _settings(method: str, has: frozenset[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings over the defaults; UsageError for one that the method does not have."""
    for argument, value in given.items():
        setting = SETTING_OF.get(argument, argument)
        if value is not None and setting not in has:
            those = f"It has: {', '.join(sorted(has))}." if has else "It has no settings."
            raise UsageError(f"method {method!r} has no {argument}, which was set to {value!r}. {those}")
    return {name: default if given[name] is None else given[name] for name, default in DEFAULTS.items()}


def _schedule(settings: Mapping[str, Any]) -> UpdateSchedule:
    return UpdateSchedule(
        prune_ratio=settings["prune_ratio"],
        interval=settings["update_interval"],
        schedule=settings["prune_schedule"],
        end=settings["update_end_step"],
    )


def _weights_of(model: nn.Module, optimizer: optim.Optimizer, keep_dense: Iterable[str]) -> dict[str, nn.Parameter]:
    weights = maskable(model, keep_dense)
    if not weights:
        raise UsageError(
            "the model has nothing to mask: no trainable weight of a convolution, linear layer, attention or GRU "
            "outside keep_dense."
        )
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(weight) in optimized for weight in weights.values()):
        raise UsageError("the optimizer holds none of the model's maskable weights: build it from this model.")
    return weights


def _checked_masks(engine: SparseEngine, state: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Tensor]:
    for key in ("method", "seed", "step", "updates", "replaced", "masks"):
        if key not in state:
            raise UsageError(f"the engine state has no {key!r}: it is not one of SparseEngine.state_dict().")
    for key in ("method", "seed"):
        if state[key] != getattr(engine, key):
            raise UsageError(f"the engine state has {key} {state[key]!r}, this engine {getattr(engine, key)!r}.")
    masks: dict[str, Tensor] = state["masks"]
    if missing := sorted(set(counts) - set(masks)):
        raise UsageError(f"the engine state lacks masks of this model: {', '.join(missing)}.")
    if extra := sorted(set(masks) - set(counts)):
        raise UsageError(f"the engine state has masks that this model does not: {', '.join(extra)}.")
    for name, mask in masks.items():
        shape = tuple(engine.masks[name].shape)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise UsageError(f"the saved mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, not torch.bool {shape}.")
        if (active := int(mask.count_nonzero())) != counts[name]:
            raise UsageError(
                f"the saved mask of {name!r} has {active} active weights, this engine's settings give {counts[name]}: "
                f"build it with the same sparsity, allocation and groups."
            )
    return masks

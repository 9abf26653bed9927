"""SparseEngine: keeps a model sparse while any optimizer trains it, and changes its topology when an update is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn, optim

from raysparse import plugins
from raysparse.errors import UsageError
from raysparse.sparse.agreement import Agreement
from raysparse.sparse.dense_weights import CHECK_EVERY, DenseWeights
from raysparse.sparse.gradients import DenseGradients
from raysparse.sparse.layout import Layout, layout
from raysparse.sparse.masks import all_bits, one_thread, zero_outside
from raysparse.sparse.method import Method
from raysparse.sparse.optimizer_state import Undo, clear, keeps_zeros, optimized_weights
from raysparse.sparse.ranges import ByTimestep, Masks, layouts, nested
from raysparse.sparse.saved_state import check_counters, check_ranges, checked_masks
from raysparse.sparse.schedules import Clock, UpdateSchedule
from raysparse.sparse.settings import given_settings
from raysparse.sparse.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The engine alone is used on other models than the paper's; where a setting is not given, these count before the
# method's own defaults.
DEFAULTS: dict[str, Any] = {"sparsity": 0.9, "update_interval": 100}
NOTHING = Layout({}, {}, [], {})


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
    weights and moments are masked after each step as well. A method that keeps weights under its masks (nm_ste) has
    moments of the dense weights; its moving average is moved by `average` and masked by `after_average`.

    Arguments:
        method: a file of sparse/methods.
        update_end_step: no topology update at or after it; None: to the end.
        seed: of the first masks and of random growth; the same on all ranks.
        keep_dense: module or parameter names left dense, beside `model.keep_dense`.
        groups: lists of layers allocated as one, default `model.allocation_groups`.
        process_group: ranks whose masks must agree; default: that of a DDP model, else none.
        settings: of the method's `Settings` (sparse/settings.py), such as sparsity, allocation, pattern, prune_ratio
            and update_interval.
    UsageError: a setting out of range or that the method does not have, nothing to mask, a pattern that no layer can
        take, or an optimizer that holds none of the model's weights or needs a closure (LBFGS).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        method: str = "rigl",
        update_end_step: int | None = None,
        seed: int = 0,
        keep_dense: Iterable[str] = (),
        groups: Sequence[Sequence[str]] | None = None,
        process_group: ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        self._method: Method = plugins.load("methods", method).METHOD
        self._settings = given_settings(method, settings, DEFAULTS)
        self._topology = Topology(self._method, self._settings, seed)
        self.method = method
        self.seed = seed
        self.step = 0  # optimizer steps that were not skipped
        self.updates = 0  # topology updates
        self._replaced: int | Tensor = 0
        self._averaged = 0  # updates that the moving average has seen
        self._optimizer = optimizer
        self._mask_weights = not keeps_zeros(optimizer)
        self._agreement = Agreement.of(model, process_group)
        self._clock = _clock(method, self._method, self._settings, update_end_step)
        momentum = getattr(self._settings, "gradient_momentum", 0.0)
        self._gradients = DenseGradients(self._method.needs, momentum)
        self._masked = False  # mask_gradients was called for the step that after_step closes
        self._weights: dict[str, nn.Parameter] = {}
        self._layout = NOTHING
        self._ranges: list[Masks] = []  # of a method with masks per range of timesteps
        self._dense: DenseWeights | None = None  # of a method that keeps the weights under its masks
        self._masks: dict[str, Tensor] = {}
        self._bits: dict[str, Tensor] = {}  # the masks as every step needs them: masks.all_bits
        if self._method.sparse:
            self._weights = optimized_weights(model, optimizer, keep_dense)
            if self._method.straight_through:
                self._dense = DenseWeights(model, self._weights, self._settings, groups)
                self._layout = self._dense.layout(0)
                masks = self._dense.masks(0)
            elif self._method.by_timestep:
                each, self._layout = layouts(model, self._weights, self._settings, groups)
                masks = {name: self._first_mask(name, self._layout) for name in self._weights}
                self._ranges = nested(each, self._first_mask)
            else:
                self._layout = layout(model, self._weights, self._settings, groups)
                masks = {name: self._first_mask(name, self._layout) for name in self._weights}
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
        return 1 - sum(self._layout.counts.values()) / total if total else 0.0

    @property
    def replaced(self) -> int:
        """Connections that topology updates made where there was none; counted on the device until it is asked for."""
        return int(self._replaced)

    @property
    def pattern(self) -> str:
        """The pattern's name; element for the dense method."""
        return str(getattr(self._settings, "pattern", "element"))

    @property
    def layout(self) -> Layout:
        """Patterns and counts of active weights by layer, and which layers could not take the pattern."""
        return self._layout

    def network(self, model: nn.Module) -> nn.Module:
        """`model`, or what goes by the timesteps' masks in its place: call that, in training and in sampling.

        model: the one in training, its average, or a copy; masked as `apply_to` masks it.
        """
        if not self._ranges:
            return model
        return ByTimestep(model, self._ranges, self._settings.bounds())

    def layer_density(self) -> dict[str, float]:
        """Parameter name -> share of active weights, in (0, 1]."""
        return self._layout.densities()

    @property
    def needs_dense_gradients(self) -> bool:
        """Whether the step at hand looks at the gradients of pruned weights.

        An update that grows by them does, and all of a method that trains the weights under its masks.
        """
        return self.keeps_dense_weights or self._gradients.needed(self._clock, self.step + 1)

    @property
    def keeps_dense_weights(self) -> bool:
        """Whether the method trains the weights under its masks too."""
        return self._dense is not None

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, inf and NaN too; keep the dense ones first where growth needs them.

        With a method that keeps weights under its masks these and their gradients come back instead, for the step.
        """
        self._masked = True
        if self._dense is not None:
            self._dense.show()
            return
        self._gradients.take(self._clock, self.step + 1, self._weights)
        for name, weight in self._weights.items():
            if weight.grad is not None:
                zero_outside(weight.grad, self._bits[name])

    def after_step(self, skipped: bool = False) -> None:
        """Count the optimizer step and, where one is due, update the topology.

        skipped: the optimizer did not step (inf under AMP): nothing is counted, nothing changes.
        UsageError: mask_gradients was not called for this step, or another rank has other masks or failed.
        """
        masked, self._masked = self._masked, False
        self._gradients.keep(skipped)
        if skipped:
            if self._dense is not None and masked:
                self._dense.hide(self._bits)
            return
        if not masked:
            raise UsageError(
                "after_step() without mask_gradients(): call that after backward(), before optimizer.step()."
            )
        step = self.step + 1
        if self._dense is not None:
            self._refresh(self._dense, step)
        elif self._mask_weights:
            self._clear_pruned()
        if self._clock is not None and self._clock.due(step):
            self._update(step, self._clock.ratio(step), self._gradients.release())
            self._clock.updated(step)
        self.step = step

    def observe(self, fid: float) -> None:
        """Tell the FID of a report, the same on all ranks: what the schedule `stall` goes by."""
        if self._clock is not None:
            self._clock.observe(fid)

    def average(self, shadow: Mapping[str, Tensor], update: Callable[[], None]) -> None:
        """Move a moving average of the weights: call it between optimizer.step() and after_step().

        shadow: parameter name -> tensor, masked; update: moves it. Of a method that keeps weights under its masks the
        dense ones are averaged. Then `after_average`.
        """
        if self._dense is not None:
            self._dense.show_average(shadow)
        update()

    def after_average(self, shadow: Mapping[str, Tensor]) -> None:
        """Mask the moving average after after_step(), as the weights are masked."""
        if self._dense is not None:
            self._dense.hide_average(shadow, self._bits)
        elif self.updates != self._averaged:
            self.apply_to(shadow)
        self._averaged = self.updates

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
        state = {
            "method": self.method,
            "seed": self.seed,
            "step": self.step,
            "updates": self.updates,
            "replaced": self.replaced,
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
        }
        if self._clock is not None:
            state["clock"] = self._clock.state_dict()
            state["gradients"] = self._gradients.state_dict()
        if self._dense is not None:
            state["hidden"] = self._dense.state_dict()
        if self._ranges:
            state["ranges"] = [{name: mask.clone() for name, mask in masks.items()} for masks in self._ranges]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over masks and counters, then zero weights and moments outside the masks.

        Load the model and the optimizer first. UsageError, with nothing changed: other method or seed, other layers or
        shapes, or other counts of active weights or patterns than this engine's settings give.
        """
        masks = {
            name: torch.empty_like(self._masks[name]).copy_(mask) for name, mask in self.check_state(state).items()
        }
        if self._dense is not None:
            self._dense.load_state_dict(state.get("hidden", {}))
        self._layout = self._layout_at(state["step"])
        self._gradients.load_state_dict(state.get("gradients", {}), self._weights)
        if self._clock is not None:
            self._clock.load_state_dict(state.get("clock", {}), state["step"])
        self._masked = False
        self._impose(masks, loaded=True)
        self.step, self.updates, self._replaced = state["step"], state["updates"], state["replaced"]
        self._averaged = self.updates

    def check_state(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The masks of a state that `load_state_dict` would take. UsageError as there; changes nothing."""
        check_counters(self, state)
        masks = checked_masks(self, state, self._layout_at(state["step"]))
        check_ranges(self._ranges, state.get("ranges", []))
        return masks

    def _layout_at(self, step: int) -> Layout:
        return self._layout if self._dense is None else self._dense.layout(step)

    def _first_mask(self, name: str, found: Layout) -> Tensor:
        return self._topology.first(name, self._weights[name], found)

    def _update(self, step: int, ratio: float, gradients: Mapping[str, Tensor]) -> None:
        """One topology update: all new masks first, then agreement with the other ranks, then the change."""
        try:
            with one_thread():
                masks = self._topology.updated(self._weights, self._masks, self._layout, step, ratio, gradients)
        except Exception:
            self._agreement.give_up(step, len(self._weights))  # the other ranks raise instead of waiting for this one
            raise
        self._agreement.check(step, masks)
        self._replaced += self._replace(masks)
        self.updates += 1

    def _replace(self, masks: dict[str, Tensor]) -> int | Tensor:
        """Put new masks in place, zero what they prune, and return how many connections are new.

        A grown weight and its moments are 0 already: they are kept so while it is pruned.
        Whatever stops this half way, Ctrl-C too, all that was zeroed gets its values back before the error goes on.
        """
        undo, bits = Undo(), dict(self._bits)
        try:
            for name, mask in masks.items():
                if mask is not self._masks[name]:
                    bits[name] = all_bits(mask)
                    undo.zero(self._optimizer, self._weights[name], self._bits[name], bits[name])
                else:  # what user code may have written where it is pruned
                    clear(self._optimizer, self._weights[name], bits[name])
        except BaseException:
            undo.restore()
            raise
        self._masks, self._bits = masks, bits
        return undo.positions  # as many are new as were pruned

    def _refresh(self, dense: DenseWeights, step: int) -> None:
        """New masks by magnitude where they are due, and the weights outside them hidden."""
        if dense.due(step):
            masks = dense.masks(step)
            if self.updates % CHECK_EVERY == 0:
                self._agreement.check(step, masks)
            self._replaced += sum((mask & ~self._masks[name]).count_nonzero() for name, mask in masks.items())
            self._masks, self._bits = masks, {name: all_bits(mask) for name, mask in masks.items()}
            self._layout = dense.layout(step)
            self.updates += 1
        dense.hide(self._bits)

    def _impose(self, masks: dict[str, Tensor], loaded: bool = False) -> None:
        """Put first or loaded masks in place and zero all that is outside them."""
        self._masks, self._bits = masks, {name: all_bits(mask) for name, mask in masks.items()}
        if self._dense is None:
            self._clear_pruned()
        elif loaded:
            self.apply_to(self._weights)
        else:
            self._dense.hide(self._bits)

    def _clear_pruned(self) -> None:
        for name, weight in self._weights.items():
            clear(self._optimizer, weight, self._bits[name])


def _clock(name: str, method: Method, settings: Any, end: int | None) -> Clock | None:
    if not method.dynamic:
        if end is not None:
            raise UsageError(f"method {name!r} has no update_end_step, which was set to {end}: its topology is fixed.")
        return None
    return Clock(UpdateSchedule.of(settings, end))

"""The training of one trial: pure PyTorch, on one process or as one rank of several, yielding Reports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysparse import rng
from raysparse.config import TrialConfig
from raysparse.data.loader import batch_indices
from raysparse.diffusion import losses
from raysparse.errors import RanksApart
from raysparse.results import Report
from raysparse.train import distributed, mask_sample, memory, runtime
from raysparse.train.conditions import on_device, placed
from raysparse.train.ema import Ema
from raysparse.train.graphed import Graphed
from raysparse.train.lr import learning_rate

if TYPE_CHECKING:
    from raysparse.diffusion.schedule import NoiseSchedule
    from raysparse.sparse.engine import SparseEngine
    from raysparse.train.costs import Costs
    from raysparse.train.evaluate import Evaluation, Evaluator, Which
    from raysparse.train.teacher import Teacher

# Losses are looked at, and ranks agree to go on, once in so many steps: each look waits for the device. On one CPU
# process a look costs nothing and is made after each step.
LOOK_STEPS = 10
# A network that says 0 has an eps loss of about 1 (the noise has variance 1), whatever the data. A trial whose loss is
# a hundred times that is lost long before a float overflows.
DIVERGED_LOSS = 100.0


@dataclasses.dataclass
class Totals:
    """What a trial adds up as it goes; part of its checkpoint."""

    train_s: float = 0.0  # in training steps since step 0; evaluation, checkpoints and `compile_s` left out
    evaluate_s: float = 0.0
    loss_sum: float = 0.0  # since the last report
    loss_steps: int = 0
    reported: int = 0  # the step of the last report
    reason: str | None = None  # why the trial diverged: it does not go on
    compile_s: float = 0.0  # in steps that were the first of a compiled or recorded network, after each resume again


class Trainer:
    """One rank of a trial. `train.setup.build` makes it; `run` trains from `step` to the end.

    All draws of a step are functions of (seed, step) and are made for the global batch, of which a rank takes its rows:
    the result does not depend on how many ranks or accumulation steps share a batch, but for rounding. A resume is the
    same bit for bit on CPUs with the same number of ranks and threads; on CUDA as far as the kernels are deterministic.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        engine: SparseEngine,
        examples: Any,
        origin: Mapping[str, str | None],
        noise_schedule: NoiseSchedule,
        evaluator: Evaluator,
        costs: Costs,
        teacher: Teacher | None = None,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.engine = engine
        self.examples = examples
        self.origin = origin  # what the examples are: a resume takes no others
        self.noise_schedule = noise_schedule
        self.evaluator = evaluator
        self.costs = costs
        self.teacher = teacher
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.step = 0  # optimizer steps done
        self.totals = Totals()
        self.ema = Ema(model, config.train.ema_decay)
        self._shadow = self.ema.parameters()
        self.masks_reported = engine.masks
        self._again = False  # whether the report of `step` was made, and is to be made again
        self.should_stop: Callable[[], bool] = lambda: False  # asked between steps; any rank's yes ends `run` early
        # Told what the rank does, step or evaluation, and at which step, whenever it got on with it.
        self.on_progress: Callable[[str, int], None] = lambda doing, step: None
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._network: nn.Module = engine.network(model)
        # Gradients of active weights alone, on all steps but those whose update grows by dense ones.
        at_a_time = config.train.share(world_size)
        self._sparse_step = self._agreed(runtime.for_training(self._network, config, engine, at_a_time))
        self._sparse_network: Callable[..., Tensor] | None = self._sparse_step
        recorded = config.train.cuda_graph and device.type == "cuda"
        if config.train.compile:
            # The masks act on gradients and on weights in place, outside the graph: it is compiled once, whatever the
            # topology does.
            compiled = functools.partial(
                torch.compile, dynamic=False, mode="reduce-overhead" if recorded else "default"
            )
            self._network = cast(nn.Module, compiled(self._network))  # by its type a function; it is a module
            if self._sparse_step is not None and device.type == "cuda":  # a CPU's kernels are no part of a graph
                self._sparse_network = compiled(self._sparse_step)
        self._graphed = Graphed(self._network) if recorded and not config.train.compile else None
        if world_size > 1:
            # device_ids would move to the GPU what is for the host (`conditions.ON_HOST`), and a GRU wait for it.
            self._network = DistributedDataParallel(self._network)
        # What compiles or records itself when it is first called.
        self._unready: set[Callable[..., Tensor]] = (
            {self._graphed or self._network} if config.train.compile or recorded else set()
        )
        if self._sparse_network is not self._sparse_step:
            assert self._sparse_network is not None
            self._unready.add(self._sparse_network)
        self._look_steps = 1 if device.type == "cpu" and world_size == 1 else LOOK_STEPS
        self._recent: list[Tensor] = []  # losses not looked at yet
        # Noise is drawn for the longest sketch of the set, so that a row's draw depends on no other row of the batch.
        self._sequences = hasattr(examples, "lengths")
        self._noise_shape = (int(examples.lengths.max()), 3) if self._sequences else tuple(examples.value_shape)

    def run(self) -> Iterator[Report]:
        """Train to the last step; a Report at each multiple of evaluate.every_steps and at the end, on all ranks.

        A trial that diverges yields a last Report that says why. Ends without one where `should_stop` said so, between
        two steps or in the middle of an evaluation, which a resume then begins again.
        """
        every, last = self.config.evaluate.every_steps, self.config.train.steps
        while True:
            due = self.step % every == 0 or self.step == last or self._lost()
            if self._again or (due and self.totals.reported < self.step):
                report = self._report()
                if report is None:
                    return
                yield report
            if self.step >= last or self._lost():
                return
            if not self._train_to(min(last, self.step - self.step % every + every)):
                return

    def resume(self, kept: Iterable[Report]) -> None:
        """Check on all ranks, before `run`, that what they loaded is one checkpoint: RanksApart where it is not.

        kept: the reports up to it; rank 0's count. `run` makes this step's again where it is lost, without the mean
        loss and the change of the masks, which began anew with it.
        """
        first, *others = distributed.from_all((self.step, self.totals), self.world_size)
        for rank, (step, totals) in enumerate(others, start=1):
            if (step, totals) != first:
                theirs = f"that of step {step}" if step != first[0] else "another one of this step"
                raise RanksApart(
                    f"rank 0 found the checkpoint of step {first[0]}, rank {rank} {theirs}: see that all nodes have "
                    "the same storage, and start again"
                )
        lost = 0 < self.step == self.totals.reported and all(report.step != self.step for report in kept)
        self._again = distributed.from_rank_0(lost, self.world_size)

    @property
    def finished(self) -> bool:
        """Whether the report of the last step is made."""
        return self.totals.reported >= self.config.train.steps and not self._again

    def _lost(self) -> bool:
        return self.totals.reason is not None

    def _train_to(self, target: int) -> bool:
        """Train until step `target`, or until the loss is lost; False where the trial was asked to stop before."""
        self.model.train()
        while self.step < target and not self._lost():
            start, unready = time.perf_counter(), len(self._unready)
            self._recent.append(self._train_step())
            self.on_progress("step", self.step)
            stop = False
            if self.step % self._look_steps == 0 or self.step == target:
                stop = self._look()
            if len(self._unready) < unready:
                self.totals.compile_s += time.perf_counter() - start
            else:
                self.totals.train_s += time.perf_counter() - start
            if stop and self.step < target:
                return False
        return True

    def _agreed(self, step: runtime.Step | None) -> runtime.Step | None:
        """None where any rank has none, for want of a compiler on its machine: all must average gradients alike."""
        without = torch.tensor(float(step is None), device=self.device)
        return None if distributed.all_sum(without, self.world_size) > 0 else step

    def _train_step(self) -> Tensor:
        """One optimizer step. -> this rank's mean loss, on the device."""
        train, optimizer = self.config.train, self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optimizer, self.step, train.steps)
        self.optimizer.zero_grad()
        timesteps, noise = self._draws()
        network = self._step_network()
        self._unready.discard(network)
        total = torch.zeros((), device=self.device)
        for part in range(train.accumulate):
            x, cond, rows = self._share(part)
            t, eps = timesteps[rows], noise[rows, : x.shape[1]] if self._sequences else noise[rows]
            last = part + 1 == train.accumulate
            with self._reduce_gradients(last), runtime.autocast(self.config.train.precision, self.device):
                noisy = self.noise_schedule.add_noise(x, eps, t)
                prediction = network(noisy, t, **cond)
                if self.teacher is None:
                    loss = losses.eps_mse(prediction, eps, cond.get("lengths"))
                else:
                    loss = self.teacher.loss(prediction, eps, noisy, t, cond)
                loss = loss / train.accumulate
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if network is self._sparse_network:  # DDP averages what its own forward pass began
            distributed.average_gradients(self._parameters, self.world_size)
        self.engine.mask_gradients()
        if optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, optimizer.clip_norm)
        self.optimizer.step()
        self.step += 1
        self.engine.average(self._shadow, lambda: self.ema.update(self.step))
        self.engine.after_step()
        self.engine.after_average(self._shadow)
        return total

    def _step_network(self) -> Callable[..., Tensor]:
        """What predicts at this step: a function of the step and the masks, so that a resume does the same."""
        if self._sparse_step is None or self.engine.needs_dense_gradients:
            return self._graphed or self._network
        self._sparse_step.follow(self.engine.masks)
        assert self._sparse_network is not None
        return self._sparse_network

    def _draws(self) -> tuple[Tensor, Tensor]:
        """Of this step, for the global batch: timesteps int64 [B], noise float32 [B, *example]."""
        seed, batch = self.config.seed, self.config.train.batch_size
        draw = rng.generator(seed, "training noise", step=self.step, device=str(self.device))
        steps = self.config.diffusion.timesteps
        timesteps = torch.randint(0, steps, (batch,), generator=draw, device=self.device)
        return timesteps, torch.randn((batch, *self._noise_shape), generator=draw, device=self.device)

    def _share(self, part: int) -> tuple[Tensor, dict[str, Tensor], slice]:
        """x, conditions and the rows in the global batch of one accumulation step of this rank."""
        train = self.config.train
        shares, share = self.world_size * train.accumulate, self.rank * train.accumulate + part
        indices = batch_indices(
            len(self.examples), train.batch_size, self.config.seed, self.step, rank=share, world_size=shares
        )
        rows = slice(share * len(indices), (share + 1) * len(indices))
        batch = self.examples.batch(indices, **self._flips(rows))
        cond = self._drop_labels(batch["cond"], rows)
        x = batch["x"]
        if train.channels_last and x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        if self._sequences and self.device.type == "cuda":  # one shape for all steps: recorded once
            x = nn.functional.pad(x, (0, 0, 0, self._noise_shape[0] - x.shape[1]))
        return on_device(x, self.device), placed(cond, self.device), rows

    def _flips(self, rows: slice) -> dict[str, Any]:
        """Which examples of the rows are mirrored; of a set whose recipe flips (PAPER: p = .5)."""
        if not getattr(self.examples, "flips", False):
            return {}
        draw = rng.numpy_generator(self.config.seed, "flips", step=self.step)
        return {"flips": draw.random(self.config.train.batch_size)[rows] < 0.5}

    def _drop_labels(self, cond: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """Some labels become the null class, so that the model learns to do without (for guidance)."""
        share = self.config.train.label_dropout
        if not share:
            return cond
        draw = rng.numpy_generator(self.config.seed, "label dropout", step=self.step)
        dropped = torch.from_numpy(draw.random(self.config.train.batch_size)[rows] < share)
        return {**cond, "labels": cond["labels"].masked_fill(dropped, self.model.null_label)}  # type: ignore[arg-type]

    def _reduce_gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Only the last backward of a step averages gradients over the ranks."""
        if isinstance(self._network, DistributedDataParallel) and not last:
            return self._network.no_sync()
        return contextlib.nullcontext()

    def _look(self) -> bool:
        """Look at the losses since the last look, on all ranks alike. -> whether any rank was asked to stop."""
        asked = torch.tensor(float(self.should_stop()), device=self.device)
        seen = distributed.all_sum(torch.stack([*self._recent, asked]), self.world_size).tolist()
        self._recent.clear()
        for place, total in enumerate(seen[:-1]):
            loss = total / self.world_size
            if not math.isfinite(loss):
                self.totals.reason = f"loss became {loss} at step {self.step - len(seen) + 2 + place}"
                break
            self.totals.loss_sum += loss
            self.totals.loss_steps += 1
        return bool(seen[-1] > 0)

    def _report(self) -> Report | None:
        """Evaluate and say how the trial stands; rank 0's view, on all ranks. None: asked to stop meanwhile."""
        totals = self.totals
        train_loss = totals.loss_sum / totals.loss_steps if totals.loss_steps else None
        if totals.reason is None and train_loss is not None and train_loss > DIVERGED_LOSS:
            totals.reason = f"mean loss {train_loss:.4g} up to step {self.step} is above {DIVERGED_LOSS:g}"
        found: Evaluation | None = None
        if totals.reason is None:
            start = time.perf_counter()
            network = self.engine.network(self.ema.evaluation_model())
            found = self.evaluator.evaluate(network, self._asked_in_evaluation, self._which())
            if found is None:
                return None
            found = distributed.from_rank_0(found, self.world_size)
            totals.evaluate_s += time.perf_counter() - start
            if found.wrong is not None:
                totals.reason = f"{found.wrong} at step {self.step}"
            elif found.validation_loss > DIVERGED_LOSS:
                totals.reason = (
                    f"validation loss {found.validation_loss:.4g} at step {self.step} is above {DIVERGED_LOSS:g}"
                )
        sound = found is not None and totals.reason is None
        if found is not None and sound:
            observed = found.fid if self.config.evaluate.intermediate is None else found.intermediate_fid
            assert observed is not None
            if not self._again:  # else it was told
                self.engine.observe(observed)
        paper, true = self.costs.spent(self.step, self.engine.updates)
        report = Report(
            step=self.step,
            train_loss=train_loss if sound else None,
            validation_loss=found.validation_loss if found and sound else None,
            fid=found.fid if found and sound else None,
            kid=found.kid if found and sound else None,
            kid_std=found.kid_std if found and sound else None,
            density=1.0 - self.engine.sparsity,
            layer_density=json.dumps(self.engine.layer_density()),
            topology_updates=self.engine.updates,
            topology_changed=self._changed(),
            train_s=totals.train_s,
            compile_s=totals.compile_s,
            evaluate_s=totals.evaluate_s,
            peak_memory_bytes=memory.peak_bytes(self.device),
            flops_spent_paper=paper,
            flops_spent_true=true,
            diverged=totals.reason is not None,
            reason=totals.reason,
            samples_png=found.samples_png if found and sound else None,
            mask_sample=mask_sample.sample(self.engine.masks),
            intermediate_fid=found.intermediate_fid if found and sound else None,
        )
        totals.loss_sum, totals.loss_steps, totals.reported = 0.0, 0, self.step
        self.masks_reported, self._again = self.engine.masks, False
        return distributed.from_rank_0(report, self.world_size)

    def _which(self) -> Which:
        """By which protocols this report's FIDs are measured: the trial's own at the last step."""
        if self.config.evaluate.intermediate is None:
            return "own"
        return "both" if self.step >= self.config.train.steps else "intermediate"

    def _asked_in_evaluation(self) -> bool:
        self.on_progress("evaluation", self.step)
        return self.should_stop()

    def _changed(self) -> float:
        """Share of the active connections that were not active at the last report."""
        now = self.engine.masks
        active = sum(int(mask.sum()) for mask in now.values())
        new = sum(int((mask & ~self.masks_reported[name]).sum()) for name, mask in now.items())
        return new / active if active else 0.0

"""Nothing in a training step reads a value from the device: a GPU's host would stand still until all before it is done.

On a CPU a wait cannot be seen, but what makes one can: the operators whose result or its shape the host needs.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Callable
from typing import Any, Self
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.diffusion import ddim
from raysparse.diffusion.losses import eps_mse
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.models import _sparse_product_training, uvit
from raysparse.models.chirodiff import Config, build
from raysparse.sparse import SparseEngine, masks
from raysparse.train import conditions, setup

WAITS = ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "equal", "repeat_interleave.Tensor", "bincount")
# Of lengths, which never leave the host; _steps is of the recurrence that only a CPU runs.
ON_THE_HOST = {"_packing", "_check_lengths", "_steps"}
RIGL = {"sparse.method": "rigl", "sparse.sparsity": 0.5, "sparse.update_interval": 3}


class Waits(TorchDispatchMode):
    """Counts what a GPU's host would have to wait for, by the function of raysparse that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self._lists = _Lists(self)

    def __enter__(self) -> Self:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith(WAITS):
            self.count(name)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/raysparse/" in frame.filename]
        self.seen[name, frames[-1].name if frames else ""] += 1


class _Lists(TorchFunctionMode):
    """Tensor.tolist, which is no operator."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            self._waits.count("tolist")
        return func(*args, **(kwargs or {}))


def waits_of(config: TrialConfig, step: int) -> dict[tuple[str, str], int]:
    """Of step number `step`."""
    trainer = setup.build(config)
    trainer.model.train()
    for _ in range(step - 1):
        trainer._train_step()
    with Waits() as waits:
        trainer._train_step()
    assert trainer.step == step
    return {place: count for place, count in waits.seen.items() if place[1] not in ON_THE_HOST}


def test_what_counts_waits_sees_them() -> None:
    with Waits() as waits:
        float(torch.ones(1))
        bool(torch.ones(1).isnan().any())
        torch.ones(3).nonzero()
        torch.ones(3).tolist()
        torch.ones(3).sum()
    assert {name: count for (name, _), count in waits.seen.items()} == {
        "_local_scalar_dense.default": 2,
        "nonzero.default": 1,
        "tolist": 1,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.accumulate": 2, "optimizer.clip_norm": None, "optimizer.name": "sgd"},
        RIGL,  # updates at steps 3, 6, ...
        RIGL | {"sparse.method": "momentum"},
        {"sparse.method": "static", "sparse.sparsity": 0.5, "sparse.pattern": "diagonal"},
    ],
)
def test_a_step_of_sketches_waits_for_nothing(tiny: Callable[..., TrialConfig], changes: dict[str, Any]) -> None:
    assert waits_of(tiny(changes), 2) == {}


@pytest.mark.parametrize("pattern", ["element", "block", "diagonal", "nm"])
@pytest.mark.parametrize("method", ["rigl", "magran", "mixed", "momentum", "set"])
def test_an_update_of_the_topology_waits_for_nothing(
    tiny: Callable[..., TrialConfig], monkeypatch: pytest.MonkeyPatch, method: str, pattern: str
) -> None:
    monkeypatch.setattr(masks, "on_host", lambda _: False)  # as on a GPU
    share = 0.2 if pattern == "block" else 0.5  # of 1,184 weights 672 are in layers that blocks do not divide
    change = {"sparse.method": method, "sparse.pattern": pattern, "sparse.block": 4, "sparse.sparsity": share}
    trainer = setup.build(tiny(RIGL, change))
    trainer.model.train()
    for _ in range(2):
        trainer._train_step()
    with Waits() as waits:
        trainer._train_step()
    assert trainer.engine.updates == 1
    assert {place: count for place, count in waits.seen.items() if place[1] not in ON_THE_HOST} == {}


def test_a_gpus_kernels_take_over_new_masks_with_one_wait_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_product_training, "_on_cuda", lambda _: True)
    model = uvit.build(uvit.Config(sample_size=8, embed_dim=256, depth=2, num_heads=4), seed=0)
    settings = {"sparsity": 0.8, "pattern": "block", "block": 64}
    engines = [SparseEngine(model, torch.optim.SGD(model.parameters()), **settings, seed=seed) for seed in (0, 1)]
    step = _sparse_product_training.SparseStep(model, engines[0].masks)
    with Waits() as waits:
        step.follow(engines[1].masks)
    assert len(engines[1].masks) > 10
    assert waits.seen == {("tolist", "lay_out_all"): 1}


def test_a_step_of_pictures_waits_for_nothing(pictures: Callable[..., TrialConfig]) -> None:
    assert waits_of(pictures(RIGL), 2) == {}


def test_a_step_with_masks_by_timestep_waits_for_its_timesteps_alone(tiny: Callable[..., TrialConfig]) -> None:
    assert waits_of(tiny({"sparse.method": "timesteps"}), 2) == {("tolist", "forward"): 1}


def test_a_step_with_masks_by_magnitude_waits_for_nothing(tiny: Callable[..., TrialConfig]) -> None:
    """Its masks are new at each step. A CPU looks for NaN first, to save a pass; other devices make the pass."""
    found = waits_of(tiny({"sparse.method": "nm_ste", "sparse.sparsity": 0.5}), 2)
    assert {function for _, function in found} == {"_best"}
    pattern = plugins.load("patterns", "nm").Groups((8, 12), 2, 4)
    assert pattern.first(torch.rand(8, 12, device="meta"), 48).device.type == "meta"


@pytest.mark.parametrize("spacing", ddim.SPACINGS)
def test_sampling_waits_once_however_many_steps(spacing: str) -> None:
    noise, schedule = torch.ones(2, 3), NoiseSchedule()  # which is made on the host
    with Waits() as waits:
        ddim.sample(lambda x, t: x, schedule, noise, steps=5, spacing=spacing)
    assert waits.seen == {("tolist", "sample"): 1}


def test_a_batch_goes_to_a_gpu_from_pinned_memory() -> None:
    """What is not pinned is copied while the host waits."""
    value, gpu = mock.MagicMock(), torch.device("cuda")
    assert conditions.on_device(value, gpu) is value.pin_memory().to.return_value
    value.pin_memory().to.assert_called_once_with(gpu, non_blocking=True)
    assert conditions.on_device(torch.ones(2), torch.device("cpu")).tolist() == [1, 1]


def test_lengths_stay_on_the_host_and_all_else_goes_to_the_device(tiny: Callable[..., TrialConfig]) -> None:
    trainer = setup.build(tiny())
    trainer.device = torch.device("meta")
    x, cond, _ = trainer._share(0)
    assert (x.device.type, cond["lengths"].device.type) == ("meta", "cpu")


def test_with_lengths_on_the_host_prediction_and_loss_read_nothing_from_the_device() -> None:
    """A meta tensor has no values: what would read one raises."""
    model = build(Config(hidden=8, layers=2), seed=0).to("meta")
    x, timesteps = torch.zeros(3, 7, 3, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    lengths = torch.tensor([7, 2, 5])
    prediction = model(x, timesteps, lengths)
    loss = eps_mse(prediction, torch.zeros_like(x), lengths)
    assert (prediction.shape, loss.device.type) == ((3, 7, 3), "meta")


def test_a_choice_of_the_highest_on_a_gpu_waits_for_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, allowed = torch.rand(1000, generator=draw).round(decimals=2), torch.rand(1000, generator=draw) < 0.7
    with Waits() as waits:
        chosen = masks._highest_torch(scores, 200, allowed)
    assert not waits.seen
    assert torch.equal(chosen, masks.highest(scores, 200, allowed))

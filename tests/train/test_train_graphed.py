"""A step recorded as CUDA graphs is the step, and what a graph cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysparse import config as configs
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.models import chirodiff
from raysparse.sparse import SparseEngine
from raysparse.train import setup
from raysparse.train.graphed import Graphed

GPU = pytest.mark.gpu


class Network(nn.Module):
    """Notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, timesteps: Tensor, *, lengths: Tensor, labels: Tensor) -> Tensor:
        return self.weight * x + timesteps + 10 * lengths + 100 * labels


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, bool]]:
    """What was recorded, and whether autocast would have remembered casts in it. Nothing is, without a GPU."""
    found: list[tuple[Any, bool]] = []

    def noted(network: Any, places: Any) -> Any:
        found.append((places, torch.is_autocast_cache_enabled()))
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", noted)
    return found


def test_it_is_recorded_once_with_conditions_by_name(recordings: list[tuple[Any, bool]]) -> None:
    graphed = Graphed(Network())
    x, timesteps, lengths, labels = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)
    for _ in range(2):
        assert graphed(x, timesteps, labels=labels, lengths=lengths).tolist() == [321.0, 321.0]
    ((places, remembers),) = recordings
    assert not remembers
    assert all(place is not given for place, given in zip(places, (x, timesteps, labels, lengths), strict=True))


def test_what_cannot_be_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    with pytest.raises(UsageError, match=r"train.cuda_graph is true, .* leave it out: operation not permitted"):
        Graphed(Network())(torch.zeros(1), torch.zeros(1))


def test_what_a_graph_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="accumulate is 2"):
        configs.parse({"train": {"cuda_graph": True, "accumulate": 2}})


def test_what_is_compiled_can_be_recorded() -> None:
    assert configs.parse({"train": {"cuda_graph": True, "compile": True}}).train.cuda_graph


def test_how_a_step_is_started_is_no_part_of_what_a_trial_is() -> None:
    assert configs.parse({"train": {"cuda_graph": True}}).trial_id == configs.parse({}).trial_id


def test_on_a_cpu_nothing_changes(tiny: Callable[..., TrialConfig]) -> None:
    ends = []
    for record in (False, True):
        trainer = setup.build(tiny({"train.cuda_graph": record}))
        trainer.model.train()
        for _ in range(2):
            trainer._train_step()
        ends.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_several_workers_are_refused(tiny: Callable[..., TrialConfig]) -> None:
    with pytest.raises(UsageError, match=r"train.cuda_graph is for one worker, the trial has 2; leave it out"):
        setup.build(tiny({"train.cuda_graph": True}), world_size=2)


@GPU
@pytest.mark.parametrize("half", [False, True])
def test_recorded_steps_are_the_steps(half: bool) -> None:
    """Bit for bit, through updates of the topology, of sketches with other lengths at each step."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ends = []
    for record in (False, True):
        model = chirodiff.build(chirodiff.Config(hidden=48, layers=2), seed=0).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        engine = SparseEngine(model, optimizer, method="rigl", sparsity=0.5, update_interval=3, prune_ratio=0.3)
        network = Graphed(model) if record else model
        draw = torch.Generator().manual_seed(0)
        for _ in range(8):
            x, eps = (torch.randn(16, 60, 3, generator=draw).cuda() for _ in range(2))
            lengths = torch.randint(1, 61, (16,), generator=draw)
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                prediction = network(x, torch.randint(0, 1000, (16,), generator=draw).cuda(), lengths=lengths)
            (prediction - eps).square().mean().backward()
            engine.mask_gradients()
            optimizer.step()
            engine.after_step()
        assert engine.updates == 2
        ends.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    for name, weight in ends[0].items():
        assert torch.equal(ends[1][name], weight), name

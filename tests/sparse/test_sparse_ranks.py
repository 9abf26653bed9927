"""Two real gloo processes: identical masks, and a rank that diverges is caught on both without a hang."""

from __future__ import annotations

import os
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine, criteria


def _data(step, rows):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator, dtype=torch.double)[rows]


def _train(model, rows, steps, seed=0, between=lambda step, model: None):
    plain = getattr(model, "module", model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    engine = SparseEngine(model, optimizer, sparsity=0.6, prune_ratio=0.4, update_interval=2, seed=seed)
    for step in range(steps):
        between(step, plain)
        optimizer.zero_grad()
        x = _data(step, rows)
        (model(x) - x).square().mean().backward()
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
    return engine


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 6)).double()


def _perturb(rank, step, model):
    if rank == 1 and step == 3:
        with torch.no_grad():
            model[2].weight.mul_(torch.linspace(0, 1, 10, dtype=torch.double))


def _fail(rank, step, model):
    if rank == 1 and step == 3:
        criteria.CRITERIA["gradient"] = lambda layer: 1 / 0


def _scenario(rank, name):
    rows = slice(rank * 4, rank * 4 + 4)
    model = DistributedDataParallel(_net())
    if name == "agree":
        return _train(model, rows, 7)
    if name == "seed":
        return _train(model, rows, 1, seed=rank)
    if name == "weights":
        return _train(model, rows, 5, between=lambda step, plain: _perturb(rank, step, plain))
    assert name == "failure"
    return _train(model, rows, 5, between=lambda step, plain: _fail(rank, step, plain))


def _worker(rank, folder):
    torch.set_num_threads(1)
    init = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    gradient = criteria.CRITERIA["gradient"]
    for name in ("agree", "seed", "weights", "failure"):
        try:
            engine = _scenario(rank, name)
            results[name] = ("masks", {n: m.tolist() for n, m in engine.masks.items()}, engine.updates, engine.replaced)
        except Exception as error:
            results[name] = (type(error).__name__, str(error))
        criteria.CRITERIA["gradient"] = gradient
        dist.barrier()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()
    os._exit(0)  # Python's shutdown may abort in gloo's threads: see train.distributed.end_process


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (folder,), nprocs=2, join=True)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def test_two_ranks_keep_identical_masks_and_grow_by_the_mean_gradient(outcomes):
    first, second = (outcome["agree"] for outcome in outcomes)
    assert first == second
    alone = _train(_net(), slice(0, 8), 7)  # one process with the whole batch
    assert first[1] == {name: mask.tolist() for name, mask in alone.masks.items()}
    assert first[2:] == (alone.updates, alone.replaced) == (3, alone.replaced)
    assert alone.replaced > 0


def test_different_seeds_are_caught_at_the_start(outcomes):
    for outcome in outcomes:
        kind, message = outcome["seed"]
        assert kind == UsageError.__name__
        assert "'0.weight' differs at step 0 on rank(s) 1" in message


def test_a_diverging_rank_is_caught_on_all_ranks_naming_the_layer(outcomes):
    for outcome in outcomes:
        kind, message = outcome["weights"]
        assert kind == UsageError.__name__
        assert "'2.weight' differs at step 4 on rank(s) 1 from rank 0" in message


def test_a_rank_that_fails_in_the_update_does_not_leave_the_other_waiting(outcomes):
    assert outcomes[1]["failure"] == ("ZeroDivisionError", "division by zero")
    kind, message = outcomes[0]["failure"]
    assert kind == UsageError.__name__
    assert "rank(s) 1 failed in the topology update" in message

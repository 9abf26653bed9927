"""What every function in sparse/criteria.py and sparse/schedules.py has to keep, found by its name."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from raysparse import plugins
from raysparse.sparse.criteria import CRITERIA, Layer
from raysparse.sparse.methods.mixed import Settings
from raysparse.sparse.schedules import SCHEDULES, Progress
from raysparse.sparse.settings import Sparse


def test_they_are_found():
    assert {"magnitude", "gradient", "random", "sign_balanced", "mixed"} <= set(CRITERIA)
    assert {"constant", "cosine", "linear", "stall"} <= set(SCHEDULES)
    assert not {"highest", "Layer"} & set(CRITERIA)


@pytest.mark.parametrize("pattern", plugins.names("patterns"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_criterion_scores_units_and_changes_nothing(name, dtype, pattern):
    found = plugins.load("patterns", pattern).of((8, 12), Sparse(pattern=pattern, block=4))
    weight, gradient = torch.randn(2, 8, 12).to(dtype)
    candidates = torch.rand(found.units) < 0.7
    candidates.view(-1)[0] = True
    count = int(candidates.sum()) // 2
    layer = Layer("x", weight, gradient, 3, 5, found, candidates, count, Settings())
    before = weight.clone(), gradient.clone(), candidates.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    scores = CRITERIA[name](layer)
    assert torch.equal(torch.get_rng_state(), state), "a criterion draws from raysparse.rng alone"
    assert scores.shape == found.units
    assert scores.is_floating_point()
    assert not scores[candidates].isnan().any()
    assert torch.equal(scores, CRITERIA[name](layer))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, gradient, candidates), strict=True))
    none = dataclasses.replace(layer, candidates=None, count=0)  # as for first masks
    assert CRITERIA[name](none).shape == found.units


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_starts_at_1_and_never_rises(name):
    values = [SCHEDULES[name](Progress(step / 50, step // 10)) for step in range(50)]
    assert values[0] == 1
    assert all(0 <= later <= earlier <= 1 for earlier, later in itertools.pairwise(values))

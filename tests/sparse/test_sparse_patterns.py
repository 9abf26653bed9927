"""Blocks, diagonals and N:M drawn by hand, and in the engine with what a pattern cannot take."""

from __future__ import annotations

import pytest
import torch
from sparse_training import train
from torch import nn

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine
from raysparse.sparse.patterns import block, diagonal, nm
from raysparse.sparse.settings import Sparse


def test_diagonals_of_a_wide_and_a_tall_matrix():
    wide, tall = diagonal.of((2, 3), Sparse()), diagonal.of((3, 2), Sparse())
    numbers = torch.tensor([0, 1, 2])
    assert wide.spread(numbers).tolist() == [[0, 1, 2], [2, 0, 1]]
    assert tall.spread(numbers).tolist() == [[0, 2], [1, 0], [2, 1]]
    assert wide.total(torch.tensor([[1.0, 2, 4], [8, 16, 32]])).tolist() == [17, 34, 12]


def test_blocks_of_a_matrix():
    pattern = block.of((4, 8), Sparse(block=4))
    assert pattern.units == (1, 2)
    assert pattern.spread(torch.tensor([[1, 2]])).tolist() == [[1] * 4 + [2] * 4] * 4
    assert block.of((6, 8), Sparse(block=4)) == "blocks of 4 x 4 do not divide 6 x 8"


def test_one_in_two_of_four_inputs_moves_inside_its_group():
    pattern = nm.of(
        (1, 8),
        Sparse(pattern="nm", sparsity=0.5),
    )
    units = pattern.first(torch.tensor([[1.0, 2, 3, 4, 9, 8, 7, 6]]), 4)
    assert units.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    kept = pattern.pruned(units, torch.tensor([[0.0, 0, 1, 5, 2, 6, 0, 0]]), 2)  # 1 and 2 go, one in each group
    assert kept.int().tolist() == [[0, 0, 0, 1, 0, 1, 0, 0]]
    grown = pattern.grown(kept, torch.tensor([[9.0, 3, 1, 0, 0, 0, 5, 7]]), 2)
    assert grown.int().tolist() == [[1, 0, 0, 1, 0, 1, 0, 1]]


def test_groups_of_a_convolution_lie_along_its_inputs():
    pattern = nm.of((2, 4, 3, 3), Sparse(pattern="nm", sparsity=0.75))
    mask = pattern.spread(pattern.first(torch.rand(2, 4, 3, 3), 18))
    assert (mask.sum(1) == 1).all()


class Mixed(nn.Module):
    """A convolution, one of kernel 1, a GRU and linear layers that blocks of 8 divide or not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3)
        self.point = nn.Conv2d(16, 16, 1)
        self.gru = nn.GRU(16, 8)
        self.odd = nn.Linear(8, 12)
        self.out = nn.Linear(16, 32)


def engine_of(**settings):
    model = Mixed()
    return SparseEngine(
        model, torch.optim.AdamW(model.parameters()), **{"method": "static", "sparsity": 0.5, **settings}
    )


def test_layers_that_a_pattern_cannot_take_are_listed():
    engine = engine_of(pattern="block", block=8)
    assert engine.layout.by_element == ["conv.weight"]
    assert engine.layout.dense == {"odd.weight": "blocks of 8 x 8 do not divide 12 x 8"}
    assert engine.masks["odd.weight"].all()
    total = sum(mask.numel() for mask in engine.masks.values())
    assert sum(int(mask.sum()) for mask in engine.masks.values()) == round(total / 2)
    engine = engine_of(pattern="diagonal", other_layers="dense", sparsity=0.3)
    assert engine.layout.by_element == []
    assert list(engine.layout.dense) == ["conv.weight"]
    assert engine.layer_density()["conv.weight"] == 1.0
    units = max(pattern.size for pattern in engine.layout.patterns.values())
    assert abs(engine.sparsity - 0.3) * total <= units / 2


def test_n_of_m_is_the_density_of_every_layer_that_takes_it():
    engine = engine_of(pattern="nm", m=16, sparsity=0.75)
    dense = {"conv.weight": "8 inputs", "gru.weight_hh_l0": "8 inputs", "odd.weight": "8 inputs"}
    assert engine.layout.dense == {name: f"groups of 16 do not divide {why}" for name, why in dense.items()}
    assert {engine.layer_density()[name] for name in engine.masks if name not in dense} == {0.25}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "blok"}, "did you mean 'block'"),
        ({"pattern": "block", "block": 3}, "block.*got 3"),
        ({"pattern": "block", "block": 128}, "block.*got 128"),
        ({"pattern": "block", "block": 64}, r"'block' fits no layer .*blocks of 64 x 64 do not divide 12 x 8"),
        ({"pattern": "nm", "sparsity": 0.9}, "leaves 0.4 of 4 weights; with m = 4 give 0, 0.25, 0.5, 0.75"),
        ({"pattern": "nm", "m": 5, "sparsity": 0.8}, "fits no layer"),
        ({"pattern": "block", "other_layers": "dense", "sparsity": 0.9}, "layers that stay dense"),
        ({"method": "dense", "pattern": "block", "sparsity": None}, "'dense' has no pattern"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        engine_of(**settings)


@pytest.mark.parametrize("pattern", ["block", "diagonal", "nm"])
def test_a_mask_of_another_pattern_is_refused(pattern):
    model = nn.Sequential(nn.Linear(8, 16))
    engine = SparseEngine(model, torch.optim.AdamW(model.parameters()), sparsity=0.5, pattern=pattern, block=4)
    state = engine.state_dict()
    other = torch.zeros(128, dtype=torch.bool)
    other[:63] = True
    other[100] = True
    state["masks"]["0.weight"] = other.reshape(16, 8)
    with pytest.raises(UsageError, match=f"does not keep the pattern '{pattern}'"):
        engine.load_state_dict(state)


@pytest.mark.parametrize("pattern", ["block", "diagonal", "nm"])
def test_counts_are_exact_after_a_thousand_updates(pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"sparsity": 0.5, "block": 4, "update_interval": 1, "prune_ratio": 0.3}
    engine = SparseEngine(model, optimizer, method="rigl", pattern=pattern, **settings)
    train(model, optimizer, engine, 1000)
    assert engine.updates == 1000
    for name, mask in engine.masks.items():
        assert int(mask.sum()) == engine.layout.counts[name]
        assert engine.layout.patterns[name].valid(mask)

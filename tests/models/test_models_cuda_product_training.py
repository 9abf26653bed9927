"""Which layers train without their zeros on a CUDA device. What they compute is tested in triton_products.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysparse.errors import UsageError
from raysparse.models import _sparse_product_training, uvit
from raysparse.models._cuda_product_training import BlockLayer, lay_out_all
from raysparse.models._sparse_product_training import SparseStep
from raysparse.sparse import SparseEngine


def mask_of(shape: tuple[int, int], edge: int, count: int, seed: int = 0) -> Tensor:
    """bool: so many blocks of that edge."""
    rows, columns = (side // edge for side in shape)
    used = torch.zeros(rows * columns, dtype=torch.bool)
    used[torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))[:count]] = True
    return used.view(rows, columns).repeat_interleave(edge, 0).repeat_interleave(edge, 1)


def layer_of(mask: Tensor) -> BlockLayer:
    found = BlockLayer(nn.Linear(mask.shape[1], mask.shape[0]))
    lay_out_all({found: mask})
    return found


@pytest.mark.parametrize(
    ("edge", "count", "pays"),
    [
        *[(64, 0, True), (64, 16, True), (64, 17, False)],  # of 64
        *[(32, 25, True), (32, 26, False), (16, 20, False), (8, 4, False)],  # of 256, 1,024, 4,096
    ],
)
def test_what_is_left_out(edge: int, count: int, pays: bool) -> None:
    assert layer_of(mask_of((512, 512), edge, count)).blocked == pays


def test_masks_of_smaller_blocks_are_never_taken_for_larger_ones() -> None:
    """26 of 16 are covered by less than a tenth of those of 32, or by more: it depends on where they lie."""
    assert not any(layer_of(mask_of((512, 512), 16, 26, seed)).blocked for seed in range(20))


@pytest.mark.parametrize(("edge", "count"), [(64, 16), (32, 25)])
def test_where_the_blocks_lie_changes_no_size_and_no_tensor(edge: int, count: int) -> None:
    """Else a compiled step were compiled anew, and a resumed one would compute in another order."""
    found, seen = layer_of(mask_of((512, 512), edge, count)), set()
    for seed in range(20):
        lay_out_all({found: (mask := mask_of((512, 512), edge, count, seed))})
        seen.add((found.blocked, found.edge, *(buffer.data_ptr() for buffer in found.buffers())))
        used = torch.zeros(512 // edge, 512 // edge, dtype=torch.bool)
        used[found.rows[:count].long(), found.columns[:count].long()] = True
        assert torch.equal(used.repeat_interleave(edge, 0).repeat_interleave(edge, 1), mask)
    assert len(seen) == 1


def test_indices_by_hand() -> None:
    mask = torch.zeros(128, 512, dtype=torch.bool)
    mask[:64, 64:128] = mask[64:, :64] = mask[64:, 192:256] = True
    found = layer_of(mask)
    assert [found.rows[:3].tolist(), found.columns[:3].tolist(), found.starts.tolist()] == [
        [0, 1, 1],
        [1, 0, 3],
        [0, 1, 3],
    ]
    assert found.turned_columns[:3].tolist() == [1, 0, 1]
    assert found.turned_starts.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 3]


def step_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> SparseStep:
    monkeypatch.setattr(_sparse_product_training, "_on_cuda", lambda _: True)
    engine = SparseEngine(model, torch.optim.SGD(model.parameters()), method="static", allocation="uniform", **settings)
    return SparseStep(model, engine.masks)


@pytest.fixture
def model() -> uvit.UViT:
    return uvit.build(uvit.Config(sample_size=8, embed_dim=256, depth=2, num_heads=4), seed=0)


@pytest.mark.parametrize(("edge", "sparsity"), [(64, 0.8), (32, 0.95)])
def test_the_step_of_a_model(edge: int, sparsity: float, model: uvit.UViT, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [*model.state_dict()]
    step = step_of(model, monkeypatch, sparsity=sparsity, pattern="block", block=edge)
    assert [layer.blocked for layer in step._layers.values()] == [True] * 12
    assert step.pays_for(1)
    assert [*model.state_dict()] == before  # the model itself is left as it is
    assert {id(parameter) for parameter in step._network[0].parameters()} == {id(p) for p in model.parameters()}


def test_it_pays_where_most_weights_lie_in_layers_by_blocks(model: uvit.UViT, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(model, monkeypatch, sparsity=0.8, pattern="block", block=64)
    masks, by_size = dict(step._masks), sorted(step._masks, key=lambda name: step._masks[name].numel())
    total, left = sum(mask.numel() for mask in masks.values()), 0
    for name in by_size:  # one layer after the other gets a full mask
        masks[name] = torch.ones_like(masks[name])
        left += masks[name].numel()
        step.follow(masks)
        assert step.pays_for(1) == (total > 2 * left), name


@pytest.mark.parametrize(
    "settings", [{"pattern": "element"}, {"pattern": "block", "block": 16}, {"pattern": "diagonal"}]
)
def test_masks_that_a_gpu_saves_nothing_by_are_refused(
    settings: dict[str, Any], model: uvit.UViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"a GPU leaves out zeros in blocks .* no layer here has such a mask"):
        step_of(model, monkeypatch, sparsity=0.9, **settings)

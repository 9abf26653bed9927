"""What is maskable, and exact top-k masks."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine, allocation, masks
from raysparse.sparse.masks import all_bits, highest, lowest, maskable, zero_outside


def test_every_weight_of_a_bidirectional_gru_and_nothing_else():
    model = nn.ModuleDict({"gru": nn.GRU(3, 4, num_layers=2, bidirectional=True), "norm": nn.LayerNorm(8)})
    expected = {f"gru.weight_{part}_l{n}{side}" for part in ("ih", "hh") for n in (0, 1) for side in ("", "_reverse")}
    assert set(maskable(model)) == expected


def test_conv_linear_attention_and_cells_but_no_norm_bias_or_embedding():
    tied = nn.Linear(6, 10, bias=False)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(2, 4, 3),
            "up": nn.ConvTranspose2d(4, 2, 2),
            "group": nn.GroupNorm(2, 4),
            "batch": nn.BatchNorm2d(4),
            "embedding": nn.Embedding(10, 6),
            "tied": tied,
            "attention": nn.MultiheadAttention(6, 2),
            "cell": nn.GRUCell(3, 4),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    tied.weight = model["embedding"].weight
    names = {"conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert set(maskable(model)) == names | {"cell.weight_ih", "cell.weight_hh"}


def test_a_shared_weight_counts_once():
    layer = nn.Linear(3, 3)
    assert list(maskable(nn.Sequential(layer, layer))) == ["0.weight"]


def test_keep_dense_takes_modules_and_parameters_and_the_models_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(maskable(model, ["1", "0.weight"])) == ["2.weight"]
    model.keep_dense = {"2"}
    assert list(maskable(model, ["1"])) == ["0.weight"]
    with pytest.raises(UsageError, match=r"'0\.wieght'.*Did you mean '0\.weight'"):
        maskable(model, ["0.wieght"])


def test_weights_without_values_of_their_own_are_refused():
    with pytest.raises(UsageError, match="lazy"):
        maskable(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(UsageError, match="parametrized"):
        maskable(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of PyTorch 2.11's own compiler
def test_names_carry_no_wrappers_prefix():
    model = nn.Sequential(nn.Linear(2, 2))
    assert list(maskable(torch.compile(model))) == ["0.weight"]
    assert list(maskable(nn.DataParallel(model))) == ["0.weight"]


def bools(*rows):
    return torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "count", "allowed", "expected"),
    [
        ([3.0, 1.0, 2.0, 5.0], 2, [1, 1, 1, 1], [1, 0, 0, 1]),
        ([3.0, 1.0, 2.0, 5.0], 2, [1, 1, 1, 0], [1, 0, 1, 0]),
        ([2.0, 7.0, 2.0, 2.0], 2, [1, 1, 1, 1], [1, 1, 0, 0]),  # a tie: the lower index
        ([2.0, 2.0, 2.0, 2.0], 2, [0, 1, 1, 1], [0, 1, 1, 0]),
        ([0.0, float("nan"), -1.0, 0.0], 3, [1, 1, 1, 1], [1, 0, 1, 1]),  # NaN comes last
        ([float("inf"), float("nan"), 1.0, 0.0], 1, [1, 1, 1, 1], [1, 0, 0, 0]),
        ([1.0, 2.0, 3.0, 4.0], 0, [1, 1, 1, 1], [0, 0, 0, 0]),
        ([1.0, 2.0, 3.0, 4.0], 3, [1, 0, 1, 1], [1, 0, 1, 1]),
    ],
)
def test_highest_drawn_by_hand(scores, count, allowed, expected):
    assert torch.equal(highest(torch.tensor(scores), count, bools(*allowed)), bools(*expected))


def test_lowest_drawn_by_hand():
    assert torch.equal(lowest(torch.tensor([3.0, 1.0, 1.0, 5.0]), 1, bools(1, 1, 1, 1)), bools(0, 1, 0, 0))
    with pytest.raises(ValueError, match="3 of 2 candidates"):
        lowest(torch.zeros(4), 3, bools(1, 1, 0, 0))


values = st.lists(st.sampled_from([-2.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5, float("nan"), float("inf"), -float("inf")]))


@settings(max_examples=200)
@given(values.filter(len), st.data())
def test_highest_equals_a_stable_sort_on_both_paths(numbers, data):
    allowed = bools(*data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers))))
    count = data.draw(st.integers(0, int(allowed.sum())))
    scores = torch.tensor(numbers)
    rank = torch.where(scores.isnan(), -float("inf"), scores)
    order = [i for i in rank.sort(descending=True, stable=True).indices.tolist() if allowed[i]]
    expected = torch.zeros(len(numbers), dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(highest(scores, count, allowed), expected)
    if count:  # what other devices run
        assert torch.equal(masks._highest_torch(scores, count, allowed), expected)
    most = data.draw(st.integers(max(1, count), len(numbers)))
    for on_host in (True, False):
        with mock.patch.object(masks, "on_host", return_value=on_host):
            assert torch.equal(masks.lowest_up_to(scores.neg(), torch.tensor(count), most, allowed), expected)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_a_running_count_is_that_of_each_vector(size):
    flags = torch.rand(3, size, generator=torch.Generator().manual_seed(size)) < 0.3
    assert torch.equal(masks._running_count(flags[0]), flags[0].cumsum(0).int())
    assert torch.equal(torch.vmap(masks._running_count)(flags), flags.cumsum(1).int())


@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_highest_of_many_with_many_ties(zeros, dtype):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(50, 200, generator=generator).abs().to(dtype)
    scores[torch.rand(50, 200, generator=generator) < zeros] = 0
    order = scores.flatten().float().sort(descending=True, stable=True).indices
    everywhere = torch.ones(50, 200, dtype=torch.bool)
    for count in (1, 700, 5000, 9990):
        expected = torch.zeros(10_000, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(highest(scores, count, everywhere).flatten(), expected)


@pytest.mark.parametrize(
    "kind", ["normal", "sorted", "ties", "few numbers", "period of the sample", "infinite", "not numbers"]
)
def test_the_highest_of_very_many_are_found_among_few(kind):
    draw = np.random.default_rng(0)
    size = 3 * masks._SAMPLED_FROM + 5
    numbers = draw.standard_normal(size).astype(np.float32)
    values = {
        "normal": numbers,
        "sorted": np.sort(numbers),
        "ties": np.where(draw.random(size) < 0.7, np.float32(0.5), numbers),
        "few numbers": np.round(numbers),
        "period of the sample": np.resize(numbers[: masks._SAMPLE], size),  # each that is looked at is the same one
        "infinite": np.where(draw.random(size) < 0.1, np.copysign(np.float32(np.inf), numbers), numbers),
        "not numbers": np.where(draw.random(size) < 0.1, np.float32(np.nan), numbers),
    }[kind]
    for share in (0.1, 1):
        mask = draw.random(size) < share
        order = [i for i in np.argsort(np.nan_to_num(-values, nan=np.inf, posinf=np.inf), kind="stable") if mask[i]]
        there = len(order)
        for count in (1, 2, there // 10, there // 2, there - 1, there):
            expected = np.zeros(size, dtype=bool)
            expected[order[:count]] = True
            assert np.array_equal(highest(torch.from_numpy(values), count, torch.from_numpy(mask)).numpy(), expected)
        sure, index, left = masks._near(values, mask, there // 3)
        assert int(sure.sum()) + left == there // 3
        few = kind not in ("period of the sample", "ties", "few numbers")
        assert not few or len(index) < there / (2 if share < 1 else 5)


def test_the_index_that_breaks_ties_does_not_depend_on_the_memory_format():
    scores = torch.zeros(4, 3, 2, 2)
    everywhere = torch.ones(4, 3, 2, 2, dtype=torch.bool)
    last = highest(scores.to(memory_format=torch.channels_last), 7, everywhere.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, highest(scores, 7, everywhere))


@pytest.mark.parametrize("threads", [1, 2])  # numpy's and, and PyTorch's
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_outside_is_exact_for_every_number(dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    numbers = [1.5, -2.0, float("inf"), -float("inf"), float("nan"), -0.0, 3e-5]
    tensor = torch.tensor([numbers, numbers], dtype=dtype)
    zero_outside(tensor, all_bits(torch.tensor([[True] * 7, [False] * 7])))
    assert torch.equal(tensor[0], torch.tensor(numbers, dtype=dtype)) or tensor[0].isnan().nonzero().tolist() == [[4]]
    assert tensor[0, [0, 1, 2, 3]].tolist() == numbers[:4]
    assert (tensor[1] == 0).all()
    assert not tensor[1].signbit().any()


def test_a_model_says_what_shape_allocation_sees():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    weights = maskable(model)
    assert masks.shapes(model, weights) == {"0.weight": (4, 3), "1.weight": (2, 4)}
    model.allocation_shapes = {"0.weight": (4, 3, 1)}
    assert masks.shapes(model, weights) == {"0.weight": (4, 3, 1), "1.weight": (2, 4)}
    engine = SparseEngine(model, torch.optim.SGD(model.parameters()), method="static", sparsity=0.5, seed=0)
    counts = allocation.counts({"0.weight": (4, 3, 1), "1.weight": (2, 4)}, sparsity=0.5)
    assert {name: int(mask.sum()) for name, mask in engine.masks.items()} == counts
    model.allocation_shapes = {"0.weight": (4, 2, 1)}
    with pytest.raises(ValueError, match="allocation_shapes says"):
        masks.shapes(model, weights)

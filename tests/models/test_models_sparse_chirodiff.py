"""The compiled kernel predicts what ChiroDiff predicts, whatever the weights, widths, lengths and batches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysparse import rng
from raysparse.diffusion import ddim
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.models import _cpu, _few_sketches, _sparse_chirodiff, _sparse_sides, chirodiff
from raysparse.models._sparse_chirodiff import SparseChiroDiff
from raysparse.models.chirodiff import ChiroDiff, Config, sparse_runtime

pytestmark = pytest.mark.usefixtures("compiler")


def model_of(sparsity: float, **options: Any) -> ChiroDiff:
    """A model whose maskable weights are 0 at random places, and its biases far from 0."""
    model = chirodiff.build(Config(**options), seed=0)
    draw = rng.generator(0, "test weights")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= torch.rand(parameter.shape, generator=draw) >= sparsity
            else:
                parameter += 0.5 * torch.randn(parameter.shape, generator=draw)
    return model.eval().requires_grad_(False)


def batch_of(lengths: list[int], classes: int | None = None) -> dict[str, Tensor]:
    draw = rng.generator(1, "test input")
    given = {
        "x": 2 * torch.randn(len(lengths), max(lengths) + 1, 3, generator=draw),
        "timesteps": torch.randint(0, 1000, (len(lengths),), generator=draw),
        "lengths": torch.tensor(lengths),
    }
    if classes is not None:
        given["labels"] = torch.randint(0, classes, (len(lengths),), generator=draw)
    return given


def predicted(model: ChiroDiff, given: dict[str, Tensor], few: bool, dense_from: float | None = None) -> Tensor:
    """By the kernel for few sketches or by the one for many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sparse_chirodiff, "_most_one_by_one", lambda *_: math.inf if few else 0)
        found: Tensor = SparseChiroDiff(model, dense_from)(**given)
    return found


def assert_equal(
    model: ChiroDiff, given: dict[str, Tensor], relative: float = 3e-6, dense_from: float | None = None
) -> None:
    want = model(**given)
    beyond = torch.arange(want.shape[1]) >= given["lengths"][:, None]
    for few in (True, False):
        got = predicted(model, given, few, dense_from)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= relative * max(1.0, float(want.abs().max()))
        assert not got[beyond].any()


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=70),
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.04, 0.3, 0.5, 0.75, 0.9, 0.97, 1.0]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["plain", "abs", "del"]),
)
def test_equals_the_model(
    lengths: list[int], hidden: int, layers: int, sparsity: float, classes: int | None, inputs: str
) -> None:
    model = model_of(sparsity, hidden=hidden, layers=layers, num_classes=classes, inputs=inputs)
    assert_equal(model, batch_of(lengths, classes))


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=140),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.97]),
    st.integers(1, 12),
)
def test_equals_the_model_in_any_number_of_passes(
    lengths: list[int], hidden: int, sparsity: float, columns: int
) -> None:
    def in_passes(count: int, density: float, fitting: float) -> list[int]:
        return [*range(columns, count, columns), count]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sparse_sides, "_pass_ends", in_passes)
        assert_equal(model_of(sparsity, hidden=hidden, layers=2), batch_of(lengths), dense_from=2.0)


@given(st.integers(1, 3000), st.floats(0.08, 1), st.floats(1, 1000))
def test_passes_fit_the_cache_and_are_of_one_size(columns: int, density: float, fitting: float) -> None:
    ends = _sparse_sides._pass_ends(columns, density, fitting)
    sizes = [end - begin for begin, end in itertools.pairwise((0, *ends))]
    assert ends[-1] == columns
    assert max(sizes) <= math.ceil(fitting)
    assert max(sizes) - min(sizes) <= 1
    assert _sparse_sides._pass_ends(columns, 0.05, fitting) == [columns]


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_equals_the_model_around_the_width_of_a_chunk(batch: int, sparsity: float) -> None:
    lengths = [1 + 7 * place % 30 for place in range(batch)]
    assert_equal(model_of(sparsity, hidden=9, layers=2), batch_of(lengths))


@pytest.mark.parametrize("points", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("hidden", [7, 16, 17, 33, 64])
def test_equals_the_model_around_the_width_of_a_vector(hidden: int, points: int) -> None:
    assert_equal(model_of(0.8, hidden=hidden, layers=2), batch_of([points]))


def test_dense_and_empty_layers_beside_each_other() -> None:
    model = model_of(0.5, hidden=12, layers=3)
    model.gru.weight_ih_l1.zero_()
    model.gru.weight_hh_l1.zero_()
    model.gru.weight_hh_l2_reverse.fill_(0.1)
    model.gru.weight_ih_l2_reverse.fill_(-0.1)
    model.gru.weight_hh_l0[3:30] = 0
    assert_equal(model, batch_of([9, 30, 1, 17]))


def test_the_kanji_model_samples_to_the_same_points() -> None:
    model = model_of(0.9, hidden=96, layers=3)
    lengths = [20, 88, 129]
    schedule = NoiseSchedule(timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)
    noise = torch.randn(3, 129, 3, generator=rng.generator(2, "test noise"))
    cond = {"lengths": torch.tensor(lengths)}
    want, got = (
        ddim.sample(network, schedule, noise, steps=4, cond=cond) for network in (model, sparse_runtime(model))
    )
    assert float((got - want).abs().max()) <= 1e-4


def test_without_lengths_all_points_count() -> None:
    model = model_of(0.5, hidden=6, layers=2)
    given = batch_of([8, 8])
    del given["lengths"]
    assert torch.allclose(sparse_runtime(model)(**given), model(**given), atol=1e-5)


def test_saturated_gates_stay_exact() -> None:
    model = model_of(0.5, hidden=8, layers=2)
    model.gru.bias_ih_l0 *= 300
    model.gru.bias_hh_l1_reverse *= 300
    assert_equal(model, batch_of([30, 12]), relative=1e-5)


@pytest.mark.parametrize("sketches", [5, 150])
def test_any_number_of_threads_gives_the_same_bits(sketches: int) -> None:
    model = model_of(0.8, hidden=24, layers=2)
    given = batch_of([1 + 13 * place % 50 for place in range(sketches)])
    network, threads = sparse_runtime(model), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(network(**given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_sketch_does_not_depend_on_the_others() -> None:
    network, lengths = sparse_runtime(model_of(0.8, hidden=24, layers=2)), [30, 5, 44, 18, 30]
    given = batch_of(lengths * 8)
    whole = network(**given)
    for place in (0, 1, 39):
        alone = network(**{name: value[place : place + 1] for name, value in given.items()})
        assert torch.allclose(alone[0], whole[place], atol=1e-6)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_sketch_only(value: float, few: bool) -> None:
    model = model_of(0.5, hidden=12, layers=2)
    given = batch_of([9, 7, 5])
    clean = predicted(model, given, few)
    given["x"][1, 3, 0] = value
    got, want = predicted(model, given, few), model(**given)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    if math.isnan(value):
        assert got[1, :7].isnan().all()
        assert want[1, :7].isnan().all()
    assert not got[1, 7:].any()


@pytest.mark.parametrize("few", [True, False])
def test_a_weight_that_is_not_finite_is_seen(few: bool) -> None:
    model = model_of(0.9, hidden=12, layers=1)
    model.gru.weight_ih_l0[0, 0] = math.nan
    given = batch_of([9])
    assert torch.equal(predicted(model, given, few).isnan(), model(**given).isnan())


def test_weights_are_those_of_the_moment_it_was_made() -> None:
    model = model_of(0.5, hidden=6, layers=1, num_classes=2)
    given, network = batch_of([5, 4], 2), sparse_runtime(model)
    before = network(**given)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(network(**given), before)


@pytest.mark.parametrize("sketches", [1, 16, 40])
def test_autocast_changes_nothing(sketches: int) -> None:
    """A bf16 trial makes it under autocast, too."""
    model, given = model_of(0.5, hidden=6, layers=1), batch_of([1 + place % 7 for place in range(sketches)])
    want = sparse_runtime(model)(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network = sparse_runtime(model)
        assert torch.equal(network(**given), want)
    assert torch.equal(network(**given), want)


def test_what_it_cannot_run_is_refused() -> None:
    model = model_of(0.5, hidden=6, layers=1)
    with pytest.raises(UsageError, match="float64 on cpu"):
        sparse_runtime(model.double())
    for part in ("", "mix"):
        hooked = model_of(0.5, hidden=6, layers=1)
        hooked.get_submodule(part).register_forward_pre_hook(lambda *_: None)
        with pytest.raises(UsageError, match="with hooks"):
            sparse_runtime(hooked)
    with pytest.raises(UsageError, match="plain ChiroDiff, got Linear"):
        sparse_runtime(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9], [3], [[3, 3]]])
def test_lengths_out_of_range_are_refused(lengths: Any) -> None:
    network = sparse_runtime(model_of(0.5, hidden=6, layers=1))
    given = batch_of([3, 3])
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers in 1 \.\. 4"):
        network(**given | {"lengths": torch.tensor(lengths)})


def test_points_of_another_form_are_refused() -> None:
    given = batch_of([3, 3])
    with pytest.raises(ValueError, match=r"x must be \[sketches, points, 3\], got \[2, 4, 2\]"):
        sparse_runtime(model_of(0.5, hidden=6, layers=1))(**given | {"x": given["x"][..., :2]})


def test_labels_are_checked_as_the_model_does() -> None:
    given = batch_of([3, 3], 2)
    with pytest.raises(UsageError, match="no classes"):
        sparse_runtime(model_of(0.5, hidden=6, layers=1))(**given)
    given["labels"][0] = 2
    with pytest.raises(UsageError, match="labels must be in"):
        sparse_runtime(model_of(0.5, hidden=6, layers=1, num_classes=2))(**given)


@pytest.mark.parametrize("dense_from", [0.0, 2.0])  # all dense, all sparse
@pytest.mark.parametrize("hidden", [11, 40])
def test_the_rule_for_dense_sides_changes_rounding_only(hidden: int, dense_from: float) -> None:
    assert_equal(model_of(0.3, hidden=hidden, layers=2), batch_of([20, 11, 3]), dense_from=dense_from)


def test_few_sketches_have_a_kernel_of_their_own() -> None:
    model = model_of(0.8, hidden=24, layers=2)
    network = sparse_runtime(model)
    for sketches, few in ((1, True), (2, True), (13, False)):
        given = batch_of([1 + 13 * place % 50 for place in range(sketches)])
        found = network(**given)
        assert torch.equal(found, predicted(model, given, few))
        assert not torch.equal(found, predicted(model, given, not few))  # rounding


@pytest.mark.parametrize(
    ("lanes", "intel", "dense", "sparse"),
    [(16, False, 14, 10), (16, True, 16, 11), (8, False, 19, 4), (8, True, 19, 4), (4, False, 5, 2)],
)
def test_the_fewer_weights_the_sooner_a_sketch_in_each_lane_is_faster(
    lanes: int, intel: bool, dense: int, sparse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu, "INTEL", intel)
    most = [_sparse_chirodiff._most_one_by_one(model_of(s, hidden=24, layers=2), lanes) for s in (0, 0.9)]
    assert most == [dense, sparse]


@given(st.integers(1, 40), st.floats(0, 1), st.sampled_from([(4, 64), (8, 8), (16, 32)]), st.integers(0, 2**16))
def test_slots_hold_each_weight_once(hidden: int, density: float, widths: tuple[int, int], seed: int) -> None:
    lanes, columns = widths
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(3 * hidden, hidden, generator=draw)
    weight *= torch.rand(weight.shape, generator=draw) < density
    found = _few_sketches.slots(weight, lanes, columns)
    back = torch.zeros(3, -(-hidden // lanes) * lanes, -(-hidden // columns) * columns)
    slot = 0
    for block, gate, group in itertools.product(*map(range, found.counts.shape)):
        for _ in range(int(found.counts[block, gate, group])):
            for lane in range(lanes):
                back[gate, block * lanes + lane, group * columns + int(found.places[slot, lane])] += found.values[
                    slot, lane
                ]
            slot += 1
    assert slot == len(found.values)
    assert torch.equal(back[:, :hidden, :hidden], weight.view(3, hidden, hidden))
    assert back.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("hidden", [3, 16, 20, 40])
def test_dense_states_are_the_weights_by_pairs_of_blocks(hidden: int) -> None:
    weight = torch.arange(1.0, 3 * hidden * hidden + 1).view(3 * hidden, hidden)
    found = iter(_few_sketches.dense_states(weight, 8).tolist())
    blocks = list(range(-(-hidden // 8)))
    for pair in (blocks[place : place + 2] for place in range(0, len(blocks), 2)):
        for column, block, gate, lane in itertools.product(range(hidden), pair, range(3), range(8)):
            unit = 8 * block + lane
            assert next(found) == (weight[gate * hidden + unit, column] if unit < hidden else 0)
    assert next(found, None) is None

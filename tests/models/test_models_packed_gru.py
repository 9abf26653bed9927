"""The packed GRU is nn.GRU: same numbers, same parameters, same gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.models import _compiled_gru, _gru_products, _packed_gru
from raysparse.models._packed_gru import PackedGRU


@pytest.fixture(params=["compiled", "PyTorch"])
def gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes the gates."""
    if request.param == "compiled":
        request.getfixturevalue("compiler")
        assert _compiled_gru.serves(torch.zeros(1))
    else:
        monkeypatch.setattr(_compiled_gru, "_library", lambda: None)
    return str(request.param)


def pair(width: int, hidden: int, layers: int, dtype: torch.dtype = torch.float32) -> tuple[nn.GRU, PackedGRU]:
    """nn.GRU and ours with the same seeded weights, 1.7 times the usual, short of where a GRU turns chaotic."""
    reference = nn.GRU(width, hidden, layers, bidirectional=True, dtype=dtype)
    draw = rng.generator(0, "test weights")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / hidden**0.5)
    ours = PackedGRU(width, hidden, layers).to(dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def packed(lengths: list[int], width: int, dtype: torch.dtype = torch.float32) -> PackedSequence:
    x = torch.randn(len(lengths), max(lengths), width, generator=rng.generator(1, "test input"))
    return pack_padded_sequence(x.to(dtype), torch.tensor(lengths), batch_first=True, enforce_sorted=False)


def run(gru: nn.GRU, given: PackedSequence) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of the input and all weights of a weighted sum of it."""
    x = given.data.clone().requires_grad_()
    output = gru(given._replace(data=x))
    data = (output if isinstance(output, PackedSequence) else output[0]).data
    weight = torch.randn(data.shape, generator=rng.generator(2, "test loss")).to(data)
    return data.detach(), list(torch.autograd.grad((data * weight).sum(), [x, *gru.parameters()]))


def assert_close(ours: Tensor, reference: Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    assert float((ours - reference).norm()) <= relative * float(reference.norm()) + 2e-6  # of order 1


def assert_equal_to_torch(lengths: list[int], hidden: int, layers: int) -> None:
    reference, ours = pair(13, hidden, layers)
    given = packed(lengths, 13)
    want, want_gradients = run(reference, given)
    got, gradients = run(ours, given)
    assert_close(got, want)
    for gradient, want_gradient in zip(gradients, want_gradients, strict=True):
        assert_close(gradient, want_gradient)


@pytest.mark.parametrize(
    "lengths", [[1], [7], [1, 1, 1], [5, 5, 5], [9, 1, 4, 9, 2], list(range(1, 40)), [60] * 20, [165] + [1] * 9]
)
@pytest.mark.parametrize(("hidden", "layers"), [(1, 1), (7, 2), (48, 2)])
def test_equals_nn_gru(gates: str, lengths: list[int], hidden: int, layers: int) -> None:
    assert_equal_to_torch(lengths, hidden, layers)


def test_equals_nn_gru_at_the_papers_size(gates: str) -> None:
    draw = rng.generator(3, "test lengths")
    lengths = (88.6 + 17 * torch.randn(32, generator=draw)).round().long().clamp(20, 165)
    assert_equal_to_torch(lengths.tolist(), 96, 3)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 9), st.integers(1, 64))
def test_equals_nn_gru_on_any_lengths_and_chunks(lengths: list[int], hidden: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_packed_gru, "_CHUNK_ROWS", chunk)
        assert_equal_to_torch(lengths, hidden, 2)
        patch.setattr(_compiled_gru, "_library", lambda: None)
        assert_equal_to_torch(lengths, hidden, 2)


def test_gradcheck_in_double() -> None:
    _, ours = pair(3, 2, 2, torch.float64)
    given = packed([4, 1, 3], 3, torch.float64)
    names = [name for name, _ in ours.named_parameters()]

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        result = torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (given._replace(data=x),))
        return result.data

    assert torch.autograd.gradcheck(output, (given.data.clone().requires_grad_(), *ours.parameters()))


def test_a_second_backward_gives_the_same(gates: str) -> None:
    _, ours = pair(13, 6, 2)
    loss = ours(packed([5, 3], 13)).data.square().sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(ours.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_gives_the_same(gates: str, context: type[torch.no_grad]) -> None:
    _, ours = pair(13, 16, 2)
    given = packed([30, 7, 19], 13)
    trained = ours(given).data
    with context():
        sampled = ours(given).data
    assert torch.equal(trained, sampled)
    assert trained.requires_grad
    assert not sampled.requires_grad


def test_same_bits_twice(gates: str) -> None:
    _, ours = pair(13, 48, 2)
    given = packed(list(range(20, 60)), 13)
    first, second = run(ours, given), run(ours, given)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_frozen_weights_get_no_gradient(gates: str) -> None:
    _, ours = pair(13, 6, 1)
    ours.weight_hh_l0.requires_grad_(False)
    ours(packed([5, 3], 13)).data.sum().backward()
    assert ours.weight_hh_l0.grad is None
    assert ours.weight_ih_l0.grad is not None


def test_autocast_computes_in_float32(gates: str) -> None:
    _, ours = pair(13, 16, 2)
    given = packed([30, 7, 19], 13)
    want, want_gradients = run(ours, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, gradients = run(ours, given)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(gradients, want_gradients, strict=True))


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("small", [0, 1_500_000])
def test_each_library_gives_the_same(gates: str, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(_gru_products, "_ONEDNN_PRODUCTS", small)
    for onednn in (False, True):
        monkeypatch.setattr(_gru_products, "ONEDNN", onednn)
        assert_equal_to_torch([9, 1, 4, 9, 2], 16, 2)


@pytest.mark.parametrize("intel", [False, True])
def test_either_tanh_gives_the_same(monkeypatch: pytest.MonkeyPatch, intel: bool) -> None:
    monkeypatch.setattr(_compiled_gru, "_library", lambda: None)
    monkeypatch.setattr(_packed_gru, "INTEL", intel)
    assert_equal_to_torch([9, 1, 4, 9, 2], 16, 2)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("hidden", [1, 7, 16, 17, 50])
def test_widths_that_vectors_do_not_fill(hidden: int) -> None:
    """The compiled gates of widths that are no multiple of the CPU's vectors, beside PyTorch's own."""
    _, ours = pair(5, hidden, 3)
    given = packed([6, 1, 3, 6], 5)
    got, gradients = run(ours, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compiled_gru, "_library", lambda: None)
        want, want_gradients = run(ours, given)
    assert_close(got, want)
    for gradient, want_gradient in zip(gradients, want_gradients, strict=True):
        assert_close(gradient, want_gradient)


def test_a_loss_that_is_nan_stays_nan(gates: str) -> None:
    _, ours = pair(3, 8, 1)
    given = packed([4, 2], 3)
    given.data[0, 0] = float("nan")
    output = ours(given).data
    assert output.isnan().any()
    assert not output[:, :8].isnan().all(), "the other sketch is untouched"


def test_without_a_compiler_it_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(source: object) -> None:
        raise UsageError("a C++ compiler is missing")

    monkeypatch.setattr(_compiled_gru.native, "load", none)
    _compiled_gru._library.cache_clear()
    try:
        assert not _compiled_gru.serves(torch.zeros(1))
        assert_equal_to_torch([9, 1, 4, 9, 2], 16, 2)
    finally:
        _compiled_gru._library.cache_clear()


@pytest.mark.gpu
def test_cuda_gives_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _, ours = pair(13, 48, 2)
    given = packed(list(range(20, 60)), 13)
    want, want_gradients = run(ours, given)
    got, gradients = run(ours.cuda(), given.to("cuda"))
    assert_close(got.cpu(), want, 1e-3)
    for gradient, want_gradient in zip(gradients, want_gradients, strict=True):
        assert_close(gradient.cpu(), want_gradient, 1e-2)

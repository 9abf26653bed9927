"""The recurrence by Triton kernels is nn.GRU's: on the GPU at hand or, with TRITON_INTERPRET=1, interpreted on the CPU.

test_models_cuda_gru.py runs it in a process of its own, as triton reads that variable once.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from raysparse.models import _cuda_gru, chirodiff
from raysparse.models._packed_gru import PackedGRU

torch.backends.cudnn.allow_tf32 = False  # float32 on both sides; of TF32 there is one test
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = [f"{name}_l0{end}" for end in ("", "_reverse") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def layer_of(inputs: int, hidden: int, draw: torch.Generator) -> nn.GRU:
    gru = nn.GRU(inputs, hidden, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / hidden**0.5)
    return gru.to(DEVICE)


def padded(gru: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got - want).norm() <= tolerance * want.norm() + 1e-6)


@settings(max_examples=12)
@given(
    hidden=st.sampled_from([1, 8, 16, 20]),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=18),
    beyond=st.integers(0, 2),
    trials=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_a_layer_and_its_gradients(hidden: int, lengths: list[int], beyond: int, trials: int, seed: int) -> None:
    """Of one trial or two, each with its own weights."""
    draw = torch.Generator().manual_seed(seed)
    grus = [layer_of(5, hidden, draw) for _ in range(trials)]
    x = torch.randn(trials, len(lengths), max(lengths) + beyond, 5, generator=draw).to(DEVICE).requires_grad_()
    ours = x.detach().clone().requires_grad_()
    size = torch.tensor(lengths)
    loss = torch.randn(*x.shape[:3], 2 * hidden, generator=draw).to(DEVICE)
    want = torch.stack([padded(gru, part, size) for gru, part in zip(grus, x, strict=True)])
    weights = [torch.stack([gru.get_parameter(name).detach() for gru in grus]).requires_grad_() for name in WEIGHTS]
    got = _cuda_gru.layer(ours, weights, size.int().expand(trials, -1).contiguous().to(DEVICE))
    assert close(got, want, 1e-5)
    theirs = torch.autograd.grad((want * loss).sum(), [x, *(gru.get_parameter(n) for n in WEIGHTS for gru in grus)])
    found = torch.autograd.grad((got * loss).sum(), [ours, *weights])
    assert close(found[0], theirs[0], 1e-5)
    for place, gradient in enumerate(found[1:]):
        assert close(gradient, torch.stack(theirs[1 + place * trials : 1 + (place + 1) * trials]), 1e-5)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve the device at hand, a CPU too."""
    monkeypatch.setattr(PackedGRU, "takes_padded", lambda self, x: True)


def sketches(draw: torch.Generator, **cond: Tensor) -> dict[str, Tensor]:
    lengths = torch.tensor([4, 9, 1, 6])
    x = torch.randn(4, 9, 3, generator=draw)
    for row, length in enumerate(lengths.tolist()):
        x[row, length:] = torch.nan  # never read
    given = {"x": x, "timesteps": torch.tensor([3, 500, 999, 0]), "lengths": lengths, **cond}
    return {name: value.to(DEVICE) for name, value in given.items()}


@pytest.mark.parametrize(("classes", "inputs"), [(None, "plain"), (3, "plain"), (None, "abs"), (3, "del")])
def test_chirodiff(classes: int | None, inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prediction and gradients, of sketches with NaN beyond their ends."""
    options = {"hidden": 8, "layers": 2, "num_classes": classes, "inputs": inputs}
    model = chirodiff.build(chirodiff.Config.model_validate(options), seed=0).to(DEVICE)
    draw = torch.Generator().manual_seed(0)
    given = sketches(draw, **({} if classes is None else {"labels": torch.tensor([0, 2, 1, 1])}))
    weight = torch.randn(4, 9, 3, generator=draw).to(DEVICE)
    found = []
    for takes in (True, False):
        monkeypatch.setattr(PackedGRU, "takes_padded", lambda self, x, takes=takes: takes)
        prediction = model(**given)
        found.append([prediction, *torch.autograd.grad((prediction * weight).sum(), list(model.parameters()))])
    for got, want in zip(*found, strict=True):
        assert close(got, want, 1e-5)
    assert not found[0][0][0, 4:].any()


def test_all_points_where_no_lengths_are_given(serving: None) -> None:
    model = chirodiff.build(chirodiff.Config(hidden=8, layers=1), seed=0).to(DEVICE)
    x, timesteps = torch.randn(2, 5, 3).to(DEVICE), torch.tensor([1, 2]).to(DEVICE)
    assert torch.equal(model(x, timesteps), model(x, timesteps, torch.tensor([5, 5])))


@pytest.mark.parametrize("lengths", [[1, 6], [0, 5], [5]])
def test_lengths_out_of_range_are_refused(serving: None, lengths: list[int]) -> None:
    model = chirodiff.build(chirodiff.Config(hidden=8, layers=1), seed=0).to(DEVICE)
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers in 1 .. 5"):
        model(
            torch.zeros(2, 5, 3, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor(lengths)
        )


def test_the_same_bits_again() -> None:
    draw = torch.Generator().manual_seed(0)
    gru, x = layer_of(5, 20, draw), torch.randn(1, 40, 9, 5, generator=draw).to(DEVICE)
    lengths = torch.randint(1, 10, (1, 40), generator=draw).int().to(DEVICE)
    weights = [gru.get_parameter(name)[None] for name in WEIGHTS]
    runs = []
    for _ in range(2):
        got = _cuda_gru.layer(x, weights, lengths)
        runs.append([got, *torch.autograd.grad(got.square().sum(), [gru.get_parameter(name) for name in WEIGHTS])])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_trials_on_top_of_each_other_become_what_they_become_alone(serving: None) -> None:
    """benchmarks/packing.py's, padded as on a GPU."""
    path = list(sys.path)
    script: dict[str, Any] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks/packing.py"))
    sys.path[:] = path
    work = script["Work"](hidden=8, layers=1, batch=4, longest=6, interval=2, device=DEVICE)
    alone, together = ([script["Trial"](work, number) for number in range(2)] for _ in range(2))
    stack = script["Stack"](together)
    for step in range(3):
        batches = [script["batch_of"](work, number, step) for number in range(2)]
        for trial, batch in zip(alone, batches, strict=True):
            trial.step(batch)
        stack.run(script["padded"](batches, DEVICE))
        for trial in together:
            trial.close()
    for one, other in zip(alone, together, strict=True):
        for name, weight in one.model.named_parameters():
            assert close(other.model.get_parameter(name), weight, 1e-4), name


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter computes float32 alone")
@pytest.mark.parametrize("hidden", [48, 96, 128])
def test_tf32_and_bfloat16_at_the_papers_widths(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    model = chirodiff.build(chirodiff.Config(hidden=hidden, layers=3), seed=0)
    given = {"x": torch.randn(40, 165, 3, generator=draw), "timesteps": torch.randint(0, 1000, (40,), generator=draw)}
    given["lengths"] = torch.randint(1, 166, (40,), generator=draw)
    want = model(**given).detach().to(DEVICE)  # by the CPU's code
    model.to(DEVICE)
    given = {name: value.to(DEVICE) for name, value in given.items()}
    assert model.gru.takes_padded(given["x"])

    def off() -> float:
        with torch.no_grad():
            return float((model(**given) - want).norm() / want.norm())

    found = {"float32": off()}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    found["TF32"] = off()
    with torch.autocast("cuda", torch.bfloat16):
        found["bfloat16"] = off()
    assert found["float32"] < 1e-5, found
    assert found["TF32"] < 2e-3, found
    assert found["bfloat16"] < 2e-2, found

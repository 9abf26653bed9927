from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from raysparse import rng
from raysparse.diffusion.losses import eps_mse
from raysparse.errors import UsageError
from raysparse.metrics import flops
from raysparse.models import chirodiff
from raysparse.models.chirodiff import ChiroDiff, Config, build
from raysparse.sparse.masks import maskable

LENGTHS = torch.tensor([5, 12, 1, 9])


def batch(points: int = 12) -> tuple[Tensor, Tensor]:
    draw = rng.generator(0, "test batch")
    return torch.randn(4, points, 3, generator=draw), torch.randint(0, 1000, (4,), generator=draw)


class Reference(nn.Module):
    """The model as its head words it, sketch by sketch and point by point on nn.GRU."""

    def __init__(self, model: ChiroDiff) -> None:
        super().__init__()
        self.config = config = model.config
        classes = config.label_features if config.num_classes else 0
        self.gru = nn.GRU(13 + classes, config.hidden, config.layers, bidirectional=True, batch_first=True)
        self.mix = nn.Linear(2 * config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden + 8 + (0 if config.inputs == "plain" else classes), 3)
        if classes:
            self.labels = nn.Embedding(config.num_classes or 0, classes)
        self.register_buffer("frequencies", torch.zeros(4))
        self.load_state_dict(model.state_dict(), strict=True)

    def forward(self, x: Tensor, timesteps: Tensor, lengths: Tensor, labels: Tensor | None = None) -> Tensor:
        result, plain = torch.zeros_like(x), self.config.inputs == "plain"
        for row, length in enumerate(lengths.tolist()):
            points = x[row : row + 1, :length]
            u = float(timesteps[row] + (0 if plain else 1)) / 1000
            phase = 2 * math.pi * 4 * self.frequencies * u
            time = torch.cat((phase.sin(), phase.cos())).expand(1, length, 8)
            more = torch.zeros(1, length, 2)
            for place in range(length):
                before = points[0, place - 1, :2] if place else torch.zeros(2)
                if self.config.inputs == "del":
                    more[0, place] = points[0, : place + 1, :2].sum(0)
                elif place or not plain:
                    more[0, place] = points[0, place, :2] - before
            label = [] if labels is None else [self.labels(labels[row]).expand(1, length, -1)]
            hidden, _ = self.gru(torch.cat((points, more, time, *label), 2))
            last = [self.mix(hidden), time, *([] if plain else label)]
            result[row, :length] = self.out(torch.cat(last, 2))[0]
        return result


@pytest.mark.parametrize(("hidden", "layers", "count"), [(128, 3, 736_027), (96, 3, 416_859), (48, 2, 65_019)])
def test_parameter_counts_of_the_paper(hidden: int, layers: int, count: int) -> None:
    model = build(Config(hidden=hidden, layers=layers), seed=0)
    assert sum(p.numel() for p in model.parameters()) == count
    assert [name for name, _ in model.named_buffers()] == ["frequencies"]


def test_every_recurrent_and_linear_weight_can_be_masked() -> None:
    names = set(maskable(build(Config(hidden=8, layers=2), seed=0)))
    recurrent = {
        f"gru.weight_{kind}_l{layer}{end}" for kind in ("ih", "hh") for layer in (0, 1) for end in ("", "_reverse")
    }
    assert names == recurrent | {"mix.weight", "out.weight"}


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("inputs", ["plain", "abs", "del"])
def test_equals_the_reference_in_loss_and_gradients(inputs: str, classes: int | None) -> None:
    model = build(Config.model_validate({"hidden": 24, "layers": 3, "inputs": inputs, "num_classes": classes}), seed=0)
    reference = Reference(model)
    x, t = batch()
    labels = {"labels": torch.tensor([0, 2, 1, 2])} if classes else {}
    eps = torch.randn(x.shape, generator=rng.generator(1, "test eps"))
    ours, theirs = (eps_mse(m(x, t, LENGTHS, **labels), eps, LENGTHS) for m in (model, reference))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    for name, parameter in model.named_parameters():
        want = reference.get_parameter(name).grad
        assert float((parameter.grad - want).norm()) <= 1e-5 * float(want.norm()), name


@pytest.mark.parametrize("inputs", ["plain", "abs", "del"])
def test_padding_is_never_read_and_comes_out_as_zero(inputs: Literal["plain", "abs", "del"]) -> None:
    model = build(Config(hidden=8, layers=2, inputs=inputs), seed=0)
    x, t = batch()
    spoilt, outside = x.clone(), torch.arange(12) >= LENGTHS[:, None]
    spoilt[outside] = float("nan")
    clean = model(x, t, LENGTHS)
    assert torch.equal(model(spoilt, t, LENGTHS), clean)
    assert not clean[outside].any()
    longer = nn.functional.pad(x, (0, 0, 0, 7), value=float("inf"))
    torch.testing.assert_close(model(longer, t, LENGTHS)[:, :12], clean, rtol=0, atol=1e-6)


def test_one_sketch_does_not_depend_on_the_others() -> None:
    model = build(Config(hidden=8, layers=2), seed=0)
    x, t = batch()
    alone = model(x[3:], t[3:], LENGTHS[3:])
    torch.testing.assert_close(model(x, t, LENGTHS)[3:], alone, rtol=1e-5, atol=1e-6)


def test_no_lengths_means_all_points() -> None:
    model = build(Config(hidden=8, layers=1), seed=0)
    x, t = batch()
    assert torch.equal(model(x, t), model(x, t, torch.full((4,), 12)))


@pytest.mark.parametrize("lengths", [[5, 12, 0, 9], [5, 13, 1, 9], [5, 12, 1]])
def test_lengths_out_of_range(lengths: list[int]) -> None:
    model = build(Config(hidden=8, layers=1), seed=0)
    with pytest.raises(ValueError, match=r"lengths must be 4 numbers in 1 .. 12"):
        model(*batch(), torch.tensor(lengths))


def test_the_timestep_and_the_neighbours_matter() -> None:
    model = build(Config(hidden=8, layers=1), seed=0)
    x, t = batch()
    before = model(x, t)
    assert not torch.allclose(model(x, (t + 100) % 1000), before)
    moved = x.clone()
    moved[:, -1] += 1
    assert not torch.allclose(model(moved, t)[:, 0], before[:, 0])  # the reverse direction carries it to the front


def test_classes() -> None:
    model = build(Config(hidden=8, layers=1, num_classes=3), seed=0)
    x, t = batch()
    first, second = (model(x, t, LENGTHS, labels=torch.full((4,), label)) for label in (0, 1))
    assert not torch.allclose(first, second)
    first.sum().backward()
    assert model.labels.weight.grad[0].any()
    assert not model.labels.weight.grad[1].any()
    with pytest.raises(UsageError, match="num_classes=3 but was given no labels"):
        model(x, t, LENGTHS)
    with pytest.raises(UsageError, match="has no classes but was given labels"):
        build(Config(hidden=8, layers=1), seed=0)(x, t, LENGTHS, labels=torch.zeros(4, dtype=torch.int64))


def test_a_label_out_of_range() -> None:
    model = build(Config(hidden=8, layers=1, num_classes=3), seed=0)
    with pytest.raises(UsageError, match=r"labels must be in 0 .. 2, got 3"):
        model(*batch(), LENGTHS, labels=torch.tensor([0, 1, 2, 3]))


def test_forward_flops_are_one_use_of_a_weight_per_point() -> None:
    config = Config(hidden=8, layers=2)
    with torch.device("meta"):
        model = build(config, seed=0)
    macs = flops.forward_macs(model, chirodiff.example(config, 1, 89, device="meta"), batch=1)
    assert macs == {name: 89 * weight.numel() for name, weight in maskable(build(config, seed=0)).items()}


def test_bf16_autocast_returns_float32() -> None:
    model = build(Config(hidden=8, layers=1), seed=0)
    x, t = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(x, t, LENGTHS)
    assert prediction.dtype == torch.float32
    torch.testing.assert_close(prediction, model(x, t, LENGTHS), rtol=0.05, atol=0.05)


def test_initial_weights_lie_within_their_bounds() -> None:
    model = build(Config(hidden=64, layers=1), seed=0)
    for module, fan_in in ((model.gru, 64), (model.mix, 128), (model.out, 72)):
        for parameter in module.parameters():
            assert float(parameter.detach().abs().max()) <= 1 / math.sqrt(fan_in)
    assert float(model.gru.weight_hh_l0.detach().std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)


def test_packed_data_reaches_the_gru_without_padding() -> None:
    model = build(Config(hidden=8, layers=1), seed=0)
    seen: list[PackedSequence] = []
    model.gru.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(*batch(), LENGTHS)
    assert seen[0].data.shape == (int(LENGTHS.sum()), 13)

"""MACs of each kind of layer by hand, then the papers' numbers."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from raysparse.errors import UsageError
from raysparse.metrics import flops, params
from raysparse.sparse import allocation

ITERATIONS_KANJIVG = 40_800  # PAPER: 600 epochs


def macs(layer: nn.Module, *shape: int, batch: int = 2) -> float:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    found = flops.forward_macs(One().to("meta"), {"x": torch.empty(batch, *shape, device="meta")}, batch)
    assert all(name.startswith("layer.weight") for name in found)
    return sum(found.values())


@pytest.mark.parametrize(
    ("layer", "shape", "want"),
    [
        (nn.Linear(5, 7), (5,), 35),
        (nn.Linear(5, 7), (11, 5), 35 * 11),
        (nn.Linear(5, 7), (3, 11, 5), 35 * 33),
        (nn.Conv1d(3, 4, 5), (3, 20), 3 * 4 * 5 * 16),
        (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 6), 3 * 4 * 9 * 48),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 8, 8), 3 * 4 * 9 * 16),
        (nn.Conv2d(6, 4, 3, groups=2, padding=1), (6, 5, 5), 3 * 4 * 9 * 25),
        (nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 5, 5), 6 * 9 * 25),
        (nn.Conv3d(2, 3, 3, padding=1), (2, 4, 4, 4), 2 * 3 * 27 * 64),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 8, 8), 3 * 4 * 4 * 64),
        (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (6, 8, 8), 6 * 2 * 4 * 64),
        (nn.GRU(5, 7, batch_first=True), (11, 5), 11 * 3 * 7 * (5 + 7)),
        (nn.GRU(5, 7, 2, batch_first=True, bidirectional=True), (11, 5), 11 * 2 * 3 * 7 * (5 + 7 + 14 + 7)),
    ],
)
def test_a_layers_macs_by_hand(layer, shape, want):
    assert macs(layer, *shape) == want


def test_a_cell_and_an_lstm_with_projection_by_hand():
    assert macs(nn.GRUCell(5, 7), 5) == 3 * 7 * (5 + 7)
    assert macs(nn.LSTM(5, 7, proj_size=2, batch_first=True), 11, 5) == 11 * (4 * 7 * (5 + 2) + 7 * 2)


class Recurrent(nn.GRU):
    """A GRU that takes lengths, as a packed CPU path does."""

    def forward(self, x, lengths):
        return super().forward(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))


class Sketcher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = Recurrent(5, 7, batch_first=True)

    def forward(self, x, lengths):
        return self.gru(x, lengths)


def test_a_recurrent_layer_counts_the_points_that_it_processes():
    inputs = {"x": torch.zeros(2, 11, 5), "lengths": torch.tensor([4, 10])}
    assert sum(flops.forward_macs(Sketcher(), inputs, 2).values()) == 7 * 3 * 7 * 12


def test_a_module_called_twice_counts_twice_and_one_left_out_not_at_all():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.unused, self.embedding = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(9, 4)

        def forward(self, x):
            return self.a(self.a(x))

    model = Twice()
    assert flops.forward_macs(model, {"x": torch.zeros(3, 4)}, 3) == {"a.weight": 32, "unused.weight": 0}
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(UsageError, match="MultiheadAttention"):
        flops.forward_macs(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), {}, 1)
    with pytest.raises(UsageError, match="no convolution"):
        flops.forward_macs(nn.Identity(), {"input": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match=r"no weight of a counted layer: b\.weight"):
        flops.forward_flops({"a.weight": 4.0}, {"b.weight": 0.5})


def test_conventions_by_hand():
    macs, densities = {"a": 100.0, "b": 50.0}, {"a": 0.1}
    assert flops.forward_flops(macs) == 300
    assert flops.forward_flops(macs, densities) == 120
    assert flops.inference(macs, densities, ddim_steps=10) == 1200
    assert flops.inference(macs, densities, ddim_steps=10, convention=flops.CHIRODIFF) == 2400
    run = {"steps": 7, "batch_size": 12}
    assert flops.train(macs, densities, **run) == pytest.approx(3 * 120 * 7 * 12)
    assert flops.train(macs, densities, **run, convention=flops.LATENT_DIFFUSION) == pytest.approx(3 * 120 * 7)
    assert flops.train(macs, densities, **run, convention=flops.CHIRODIFF) == pytest.approx(3 * 240 * 7)


def test_rigls_amortised_training_by_hand():
    assert flops.rigl_share(1.0, 100) == 1.0
    assert flops.rigl_share(0.1, 10) == pytest.approx((2.7 + 0.2 + 1) / 30)
    macs, run = {"a": 100.0}, {"steps": 5, "batch_size": 2, "dense_gradient_interval": 9}
    paper = flops.train(macs, {"a": 0.1}, **run, convention=flops.LATENT_DIFFUSION)
    assert paper == pytest.approx(600 * 5 * 0.13)  # RigL's appendix H: one dense gradient in ΔT + 1 steps
    assert flops.train(macs, {"a": 0.1}, **run) == pytest.approx(600 * 5 * 2 * (8 * 0.3 + 0.2 + 1) / 27)  # in ΔT
    with pytest.raises(ValueError, match="at least 1 step"):
        flops.rigl_share(0.1, 0)


def test_a_models_file_names_its_papers_convention():
    assert flops.paper_convention(types.ModuleType("unet")) is flops.LATENT_DIFFUSION
    sketch = types.ModuleType("sketch")
    sketch.PAPER_CONVENTION = "chirodiff"
    assert flops.paper_convention(sketch) is flops.CHIRODIFF
    sketch.PAPER_CONVENTION = "chiro"
    with pytest.raises(ValueError, match="did you mean 'chirodiff'"):
        flops.paper_convention(sketch)


@pytest.fixture(scope="module")
def latent_unet():
    from diffusers import UNet2DModel

    with torch.device("meta"):
        return UNet2DModel(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            flip_sin_to_cos=True,
            freq_shift=0,
            down_block_types=("DownBlock2D", *3 * ["AttnDownBlock2D"]),
            up_block_types=(*3 * ["AttnUpBlock2D"], "UpBlock2D"),
            block_out_channels=(224, 448, 672, 896),
            layers_per_block=2,
            attention_head_dim=32,
            norm_eps=1e-5,
        )


@pytest.fixture(scope="module")
def latent_macs(latent_unet):
    with torch.device("meta"):
        inputs = {"sample": torch.empty(2, 3, 64, 64), "timestep": torch.zeros(2, dtype=torch.long)}
    return flops.forward_macs(latent_unet, inputs, 2)


def test_latent_diffusions_flops_are_the_papers(latent_unet, latent_macs):
    with torch.device("meta"):
        inputs = {"sample": torch.empty(1, 3, 64, 64), "timestep": torch.zeros(1, dtype=torch.long)}
    assert flops.forward_macs(latent_unet, inputs, 1) == latent_macs
    assert params.count(latent_unet) == 274_056_163
    assert flops.forward_flops(latent_macs) == pytest.approx(1.92036e11, rel=3e-6)
    assert flops.inference(latent_macs, ddim_steps=100) == pytest.approx(1.92e13, rel=1e-3)


@pytest.mark.parametrize(("examples", "printed"), [(12_500, 9.0046e16), (10_598, 7.6392e16), (9_469, 6.8269e16)])
def test_latent_diffusions_training_as_printed_leaves_the_batch_out(latent_macs, examples, printed):
    run = {"steps": 150 * -(-examples // 12), "batch_size": 12}
    got = flops.train(latent_macs, **run, convention=flops.LATENT_DIFFUSION)
    assert got == pytest.approx(printed, rel=3e-4)
    assert flops.train(latent_macs, **run) == pytest.approx(12 * got)


# PAPER.md 4: share of the parameters and of the FLOPs left at each sparsity.
ERK = [
    (0.10, 0.9001, 0.9736),
    (0.25, 0.7502, 0.9079),
    (0.50, 0.5003, 0.6751),
    (0.75, 0.2505, 0.2884),
    (0.90, 0.1006, 0.1237),
]


@pytest.mark.parametrize(("sparsity", "params_ratio", "flops_ratio"), ERK)
def test_latent_diffusions_ratios_under_erk(latent_unet, latent_macs, sparsity, params_ratio, flops_ratio):
    shapes = {name: tuple(weight.shape) for name, weight in latent_unet.named_parameters() if name in latent_macs}
    attentions = [name.removesuffix("to_q.weight") for name in shapes if name.endswith("to_q.weight")]
    groups = [[f"{prefix}to_{part}.weight" for part in "qkv"] for prefix in attentions]
    densities = allocation.densities(shapes, sparsity=sparsity, allocation="erk", groups=groups)
    share = flops.forward_flops(latent_macs, densities) / flops.forward_flops(latent_macs)
    assert share == pytest.approx(flops_ratio, abs=1e-4)
    assert params.active_at(latent_unet, densities) / params.count(latent_unet) == pytest.approx(params_ratio, abs=6e-5)


def test_chirodiffs_numbers_are_the_papers():
    # h = 96, 3 layers, both directions, then Linear(192, 96) and Linear(104, 3); each weight once per point.
    inputs = [13, 192, 192]
    weights = 2 * sum(3 * 96 * (n + 96) for n in inputs) + 192 * 96 + 104 * 3
    macs = {"all": weights * 88.6}  # PAPER: KanjiVG's mean points
    paper = flops.CHIRODIFF
    assert flops.inference(macs, ddim_steps=50, convention=paper) == pytest.approx(7.35e9, rel=5e-3)
    training = flops.train(macs, steps=ITERATIONS_KANJIVG, batch_size=128, convention=paper)
    assert training == pytest.approx(18e12, rel=5e-3)
    sparse = flops.inference(macs, {"all": 0.25}, ddim_steps=50, convention=paper)
    assert sparse / flops.inference(macs, ddim_steps=50, convention=paper) == 0.25
    assert flops.train(macs, steps=10, batch_size=128) == pytest.approx(3 * 2 * macs["all"] * 10 * 128)

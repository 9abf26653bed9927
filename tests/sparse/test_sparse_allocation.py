"""Counts per layer: solved by hand, exact in total for any shapes, and equal to the papers' U-Net table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raysparse.errors import UsageError
from raysparse.sparse.allocation import ALLOCATIONS, counts, densities

CONV, LINEAR = (4, 2, 3, 3), (4, 4)  # 72 and 16 weights


@pytest.mark.parametrize(
    ("allocation", "sparsity", "shapes", "expected"),
    [
        ("uniform", 0.5, {"a": (4, 4), "b": (2, 4)}, {"a": 8, "b": 4}),
        # ε = 10 / (8 + 4): 6.67 and 3.33; the larger remainder gets the last one
        ("er", 0.5, {"a": (4, 4), "b": (2, 2)}, {"a": 7, "b": 3}),
        # ε = 51 / 20 asks 10.2 of b's 4 weights: b is dense, a gets the other 47
        ("er", 0.25, {"a": (8, 8), "b": (2, 2)}, {"a": 47, "b": 4}),
        # ε = 44 / (12 + 8) asks 17.6 of the linear's 16
        ("erk", 0.5, {"conv": CONV, "linear": LINEAR}, {"conv": 28, "linear": 16}),
        # ε = 1.1: 13.2 and 8.8
        ("erk", 0.75, {"conv": CONV, "linear": LINEAR}, {"conv": 13, "linear": 9}),
        # ER ignores the kernel: ε = 22 / (6 x 9 + 8): 19.2 and 2.8
        ("er", 0.75, {"conv": CONV, "linear": LINEAR}, {"conv": 19, "linear": 3}),
        # one layer freezes, which raises ε until a second one does: ε = 2, then 102 / 40 asks 25.5 of 25
        ("er", 0.2, {"a": (20, 10), "b": (2, 2), "c": (5, 5)}, {"a": 154, "b": 4, "c": 25}),
        ("erk", 0.0, {"conv": CONV, "linear": LINEAR}, {"conv": 72, "linear": 16}),
        # 1 of 88 would go to the conv alone: each layer keeps one
        ("uniform", 0.977, {"conv": CONV, "linear": LINEAR}, {"conv": 1, "linear": 1}),
    ],
)
def test_counts_solved_by_hand(allocation, sparsity, shapes, expected):
    assert counts(shapes, sparsity=sparsity, allocation=allocation) == expected


def test_a_group_is_one_tensor_joined_along_n_out():
    shapes = {"q": (2, 4), "out": (4, 4), "k": (2, 4), "v": (2, 4)}
    # joined 6 x 4: demand 10, the other 8; ε = 20 / 18: 11.1 and 8.9
    got = counts(shapes, sparsity=0.5, allocation="er", groups=[["q", "k", "v"]])
    assert got == {"q": 4, "out": 9, "k": 4, "v": 3}
    assert list(got) == list(shapes)


shape = st.lists(st.integers(1, 24), min_size=2, max_size=4).map(tuple)


@settings(max_examples=300)
@given(
    st.lists(shape, min_size=1, max_size=8),
    st.floats(0, 0.999),
    st.sampled_from(sorted(ALLOCATIONS)),
    st.integers(0, 3),
)
def test_the_total_is_exact_and_no_layer_empty_or_overfull(shapes, sparsity, allocation, grouped):
    named = {f"l{index}": tuple(s) for index, s in enumerate(shapes)}
    named |= {f"g{index}": (3 + index, 5) for index in range(grouped)}
    groups = [[name for name in named if name.startswith("g")]]
    sizes = {name: math.prod(s) for name, s in named.items()}
    total = round((1 - sparsity) * sum(sizes.values()))
    if total < len(named):
        with pytest.raises(UsageError, match="at least one"):
            counts(named, sparsity=sparsity, allocation=allocation, groups=groups)
        return
    got = counts(named, sparsity=sparsity, allocation=allocation, groups=groups)
    assert sum(got.values()) == total
    assert all(1 <= got[name] <= sizes[name] for name in named)


@settings(max_examples=100)
@given(st.lists(shape, min_size=2, max_size=6), st.floats(0.05, 0.9))
def test_one_epsilon_serves_all_layers_that_are_not_dense(shapes, sparsity):
    named = {f"l{index}": tuple(s) for index, s in enumerate(shapes)}
    if round((1 - sparsity) * sum(math.prod(s) for s in shapes)) < 4 * len(shapes):
        return
    got = counts(named, sparsity=sparsity, allocation="erk")
    free = {n: c for n, c in got.items() if 1 < c < math.prod(named[n])}
    # rounding moves a count by less than 1, the least-one rule takes at most one more from the others per layer
    epsilons = [(count / sum(named[n]), 2.0 / sum(named[n])) for n, count in free.items()]
    lower = max((e - slack * len(shapes) for e, slack in epsilons), default=0)
    upper = min((e + slack * len(shapes) for e, slack in epsilons), default=math.inf)
    assert lower <= upper
    for name, count in got.items():
        if count == math.prod(named[name]) and epsilons:
            assert upper * sum(named[name]) >= count - 1  # dense because ε asked for it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"1\.0.*\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": math.nan}, r"\[0, 1\)"),
        ({"allocation": "er-k"}, "did you mean 'erk'"),
        ({"groups": [["a", "x"]]}, "'x', which is no masked layer"),
        ({"groups": [["a"], ["a", "b"]]}, "in allocation groups 0 and 1"),
        ({"groups": [["a", "b"]]}, "other sizes differ"),
        ({"sparsity": 0.99}, "each layer keeps"),
        ({"shapes": {}}, "no layer"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"shapes": {"a": (4, 4), "b": (2, 2)}, "sparsity": 0.5, "allocation": "er"} | change
    with pytest.raises(UsageError, match=message):
        counts(arguments.pop("shapes"), **arguments)


def test_the_latent_unet_of_the_paper():
    """PAPER.md 4: parameter and FLOPs ratios of the Latent Diffusion U-Net under ERK, q, k, v as one tensor."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.UNet2DModel(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            flip_sin_to_cos=True,
            freq_shift=0,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
            block_out_channels=(224, 448, 672, 896),
            layers_per_block=2,
            attention_head_dim=32,
            norm_eps=1e-5,
        ).eval()
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim >= 2}
        macs = _macs(model, torch.empty(1, 3, 64, 64))
    total = sum(p.numel() for p in model.parameters())
    assert total == 274_056_163
    assert 2 * sum(macs.values()) == pytest.approx(1.92036e11, rel=1e-5)
    attention = sorted({name.rsplit(".to_q.", 1)[0] for name in shapes if ".to_q." in name})
    groups = [[f"{prefix}.to_{x}.weight" for x in "qkv"] for prefix in attention]
    for sparsity, params, flops in [
        (0.1, 0.9001, 0.9736),
        (0.25, 0.7502, 0.9079),
        (0.5, 0.5003, 0.6751),
        (0.75, 0.2505, 0.2884),
        (0.9, 0.1006, 0.1237),
    ]:
        density = densities(shapes, sparsity=sparsity, allocation="erk", groups=groups)
        removed = sum((1 - d) * math.prod(shapes[name]) for name, d in density.items())
        assert 1 - removed / total == pytest.approx(params, abs=5.1e-5)
        sparse = sum(density[name] * count for name, count in macs.items())
        # the table was made with q, k, v as 1x1 convolutions, whose kernel ERK counts: the fourth digit moves by 1
        assert sparse / sum(macs.values()) == pytest.approx(flops, abs=1e-4)


def _macs(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Weight name -> multiplications of one forward pass, from the output's size."""
    found: dict[str, int] = {}

    def hook_of(name):
        def hook(module, _, output):
            uses = output.numel() // module.weight.shape[0]
            found[f"{name}.weight"] = uses * module.weight.numel()

        return hook

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(x, torch.zeros(1))
    for handle in handles:
        handle.remove()
    return found

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.metrics import flops, params
from raysparse.models import latent_unet
from raysparse.models.latent_unet import CIN256_V2, CIN_LDM_VQ_F8, SMALL, Config, LatentUNet, build, example
from raysparse.sparse import allocation, masks

CONDITIONAL = SMALL | {"num_classes": 3, "context_dim": 12}


def on_meta(**options: Any) -> LatentUNet:
    with torch.device("meta"):
        return build(Config(**options), seed=0)


def lively(model: nn.Module) -> nn.Module:
    """The model with none of its zeros."""
    draw = rng.generator(1, "lively")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def batch(config: Config, count: int = 2) -> dict[str, Tensor]:
    inputs = example(config, count, 1)
    inputs["x"] = torch.randn(inputs["x"].shape, generator=rng.generator(0, "test batch"))
    inputs["timesteps"] = torch.arange(count) * 300
    return inputs


@pytest.mark.parametrize(
    ("options", "unet", "embedding"),
    [({}, 274_056_163, 0), (CIN_LDM_VQ_F8, 394_984_196, 1001 * 512), (CIN256_V2, 400_920_579, 1001 * 512)],
    ids=["celebahq-ldm-vq-4", "cin-ldm-vq-f8", "cin256-v2"],
)
def test_parameter_counts_of_the_originals(options: dict[str, Any], unet: int, embedding: int) -> None:
    model = on_meta(**options)
    assert params.count(model.unet) == unet
    assert params.count(model) == unet + embedding


def test_structure_of_the_original() -> None:
    unet = on_meta().unet
    assert (unet.config.flip_sin_to_cos, unet.config.freq_shift) == (True, 0)
    norms = [m for m in unet.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-5)}
    attention = [m for m in unet.modules() if hasattr(m, "to_q")]
    assert len(attention) == 16
    assert {(m.to_q.out_features // m.heads, m.scale) for m in attention} == {(32, 32**-0.5)}
    assert [len(getattr(block, "attentions", ())) for block in (*unet.down_blocks, *unet.up_blocks)] == [
        *(0, 2, 2, 2),
        *(3, 3, 3, 0),
    ]


def test_heads_of_the_conditional_originals() -> None:
    for options, heads in ((CIN256_V2, {1}), (CIN_LDM_VQ_F8, {8, 16, 32})):
        attention = [m for m in on_meta(**options).modules() if hasattr(m, "to_q")]
        assert {m.heads for m in attention} == heads
        if options is CIN_LDM_VQ_F8:
            assert {m.to_q.out_features // m.heads for m in attention} == {32}


def test_the_zeros_of_the_original() -> None:
    model = on_meta()
    zeroed = latent_unet._zeroed(model.config)
    weights = [m.weight for name, m in model.named_modules() if zeroed(name)]
    assert len(weights) == 39
    assert sum(w.numel() for w in weights) == 90_272_672  # as in the original, built beside it


@pytest.mark.parametrize(("options", "end"), [(SMALL, ".to_out.0"), (CONDITIONAL, ".proj_out")])
def test_nothing_else_starts_at_zero(options: dict[str, Any], end: str) -> None:
    model = build(Config(**options), seed=0)
    products = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    zero = {name for name, m in products.items() if not any(p.any() for p in m.parameters())}
    assert zero == {name for name in products if name.endswith((".conv2", end, "conv_out"))}
    assert all(p.any() for name in products.keys() - zero for p in products[name].parameters())
    assert not model(**batch(model.config)).any()


def test_first_weights_are_uniform_within_the_root_of_the_fan_in() -> None:
    model = build(Config(**CONDITIONAL), seed=0)
    convolution = model.unet.down_blocks[0].resnets[0].conv1
    bound = 1 / math.sqrt(16 * 9)
    assert 0.98 * bound < convolution.weight.abs().max() <= bound
    assert float(convolution.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert convolution.bias.abs().max() <= bound
    assert float(model.class_embedding.weight.detach().std()) == pytest.approx(1, rel=0.3)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    assert all((m.weight == 1).all() and not m.bias.any() for m in norms)


# PAPER 4: printed to four digits there; of all weights, F of one 3x64x64 latent.
TABLE = [(0.10, 0.9001, 0.9736), (0.25, 0.7502, 0.9079), (0.50, 0.5003, 0.6751), (0.75, 0.2505, 0.2884)]
TABLE.append((0.90, 0.1006, 0.1237))


@pytest.fixture(scope="module")
def paper_size() -> tuple[LatentUNet, dict[str, float]]:
    model = on_meta()
    return model, flops.forward_macs(model, example(model.config, 1, 1, device="meta"), batch=1)


def densities(model: LatentUNet, sparsity: float) -> dict[str, float]:
    shapes = masks.shapes(model, masks.maskable(model))
    return allocation.densities(shapes, sparsity=sparsity, allocation="erk", groups=model.allocation_groups)


def test_flops_of_the_paper(paper_size: tuple[LatentUNet, dict[str, float]]) -> None:
    macs = paper_size[1]
    assert flops.forward_flops(macs) == pytest.approx(1.92036e11, rel=3e-6)
    assert flops.inference(macs, ddim_steps=100) == pytest.approx(1.9204e13, rel=2.5e-5)
    paper = flops.paper_convention(latent_unet)
    for examples, printed in ((12_500, 9.0046e16), (10_598, 7.6392e16), (9_469, 6.8269e16)):
        steps = 150 * math.ceil(examples / 12)
        cost = flops.train(macs, steps=steps, batch_size=12, convention=paper)
        assert float(f"{cost:.4e}") == printed
        assert flops.train(macs, steps=steps, batch_size=12) == pytest.approx(12 * cost)


@pytest.mark.parametrize(("sparsity", "weights", "operations"), TABLE)
def test_costs_of_the_paper(
    paper_size: tuple[LatentUNet, dict[str, float]], sparsity: float, weights: float, operations: float
) -> None:
    model, macs = paper_size
    density = densities(model, sparsity)
    assert round(params.active_at(model, density) / params.count(model), 4) == weights
    assert round(flops.forward_flops(macs, density) / flops.forward_flops(macs), 4) == operations


def test_allocation_groups_and_shapes() -> None:
    model = build(Config(**SMALL), seed=0)
    weights = masks.maskable(model)
    assert set(weights) == {name for name, p in model.named_parameters() if p.ndim >= 2}
    assert len(model.allocation_groups) == 4  # one on the way down, one in the middle, two on the way up
    for group in model.allocation_groups:
        assert [name.split(".")[-2] for name in group] == ["to_q", "to_k", "to_v"]
    assert set(model.allocation_shapes) == {name for name in weights if ".attentions." in name}
    assert all(shape == (*weights[name].shape, 1) for name, shape in model.allocation_shapes.items())


def test_only_self_attention_is_grouped_whatever_the_widths() -> None:
    model = build(Config(**SMALL, num_classes=3, context_dim=32), seed=0)  # 32: as wide as the level
    names = [name for group in model.allocation_groups for name in group]
    assert len(names) == 12
    assert all(".attn1." in name for name in names)
    assert model.allocation_shapes == {}
    assert "class_embedding.weight" not in masks.maskable(model)
    assert any(".attn2.to_k" in name for name in masks.maskable(model))
    assert densities(model, 0.5)


def test_classes_change_the_prediction_and_the_null_class_is_the_last() -> None:
    model = lively(build(Config(**CONDITIONAL), seed=0))
    assert model.null_label == 3
    assert build(Config(**SMALL), seed=0).null_label is None
    inputs = batch(model.config, 1)
    seen = [model(**inputs | {"labels": torch.tensor([label])}) for label in range(4)]
    assert all(not torch.equal(seen[a], seen[b]) for a in range(4) for b in range(a))


def test_bad_labels_are_the_users_error() -> None:
    model, plain = build(Config(**CONDITIONAL), seed=0), build(Config(**SMALL), seed=0)
    inputs = batch(plain.config)
    for bad, got in (([0, 4], "got 4"), ([-1, 0], "got -1")):
        with pytest.raises(UsageError, match=rf"labels must be in 0 \.\. 3 .*{got}"):
            model(**inputs, labels=torch.tensor(bad))
    with pytest.raises(UsageError, match="given no labels"):
        model(**inputs)
    with pytest.raises(UsageError, match="has no classes"):
        plain(**inputs, labels=torch.tensor([0, 1]))


def test_an_x_that_does_not_fit_is_the_users_error() -> None:
    model = build(Config(**SMALL), seed=0)
    for shape in ((2, 4, 8, 8), (2, 3, 7, 8), (3, 8, 8)):
        with pytest.raises(UsageError, match=r"takes x of shape \[B, 3, H, W\]"):
            model(torch.zeros(shape), torch.tensor([0, 1]))


@pytest.mark.parametrize("options", [SMALL, CONDITIONAL])
def test_the_prediction_is_float32_under_autocast(options: dict[str, Any]) -> None:
    model = lively(build(Config(**options), seed=0))
    inputs = batch(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**inputs)
    assert rough.dtype == torch.float32
    exact = model(**inputs)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("options", [SMALL, CONDITIONAL])
def test_one_graph_under_compile(options: dict[str, Any]) -> None:
    model = lively(build(Config(**options), seed=0))
    inputs = batch(model.config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs), model(**inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_levels": (True,)}, "attention_levels has 1 entries, block_out_channels 4"),
        ({"norm_num_groups": 48}, "no positive multiple of norm_num_groups 48"),
        ({"sample_size": 60}, "take a multiple of 8"),
        ({"attention_head_dim": 30}, "no multiple of attention_head_dim 30"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(**options)


@pytest.mark.parametrize("options", [SMALL, CONDITIONAL])
def test_plain_diffusers_loads_the_inner_network(options: dict[str, Any], tmp_path: Path) -> None:
    model = lively(build(Config(**options), seed=0))
    model.unet.save_pretrained(tmp_path)
    loaded = type(model.unet).from_pretrained(tmp_path, local_files_only=True)
    inputs = batch(model.config)
    context = {}
    if model.config.num_classes is not None:
        context["encoder_hidden_states"] = model.class_embedding(inputs["labels"])[:, None]
    assert torch.equal(loaded(inputs["x"], inputs["timesteps"], **context).sample, model(**inputs))


def test_what_a_single_token_of_context_leaves_idle() -> None:
    """Attention over one token is 1 whatever q and k are, as in the original; growth by gradient sees rounding."""
    model = lively(build(Config(**CONDITIONAL), seed=0))
    model(**batch(model.config)).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-5}
    ends = (".attn2.to_q.weight", ".attn2.to_k.weight", ".norm2.weight", ".norm2.bias")
    assert idle == {n for n, _ in model.named_parameters() if ".transformer_blocks." in n and n.endswith(ends)}
    assert max(float(p.grad.abs().max()) for p in model.parameters()) > 1


def test_the_conditional_model_is_built_and_counted_as_every_model() -> None:
    config = Config(**CONDITIONAL)
    before = torch.random.get_rng_state()
    first, second, other = (build(config, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["class_embedding.weight"], other["class_embedding.weight"])
    real = flops.forward_macs(build(config, seed=0), example(config, 2, 1), batch=2)
    assert flops.forward_macs(on_meta(**CONDITIONAL), example(config, 2, 1, device="meta"), batch=2) == real
    assert all(real.values())

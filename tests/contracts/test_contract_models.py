"""What every model must do. A new file in raysparse/models/ joins by existing.

It needs KIND, Config, build and SMALL, the Config of a model that these tests can afford; a denoiser `example`, a first
stage `load` and `identity`.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from raysparse import plugins, rng
from raysparse.errors import UsageError
from raysparse.metrics import flops
from raysparse.sparse.masks import maskable

POINTS = 7  # of a sketch; images ignore it


KINDS = {name: plugins.load("models", name).KIND for name in plugins.names("models")}


@pytest.fixture(params=[name for name, kind in KINDS.items() if kind == "denoiser"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("models", request.param)


@pytest.fixture(params=[name for name, kind in KINDS.items() if kind == "first_stage"])
def stage(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("models", request.param)


@pytest.fixture(params=KINDS)
def any_module(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("models", request.param)


def small(module: ModuleType, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model and random inputs for it."""
    config = module.Config(**module.SMALL)
    inputs = module.example(config, 2, POINTS, device="cpu")
    draw = rng.generator(0, "contract")
    inputs["x"] = torch.randn(inputs["x"].shape, generator=draw)
    inputs["timesteps"] = torch.tensor([0, 999])
    return module.build(config, seed=seed), inputs


def test_every_kind_is_known() -> None:
    assert set(KINDS.values()) == {"denoiser", "first_stage"}


def test_config_is_frozen_and_refuses_unknown_keys(any_module: ModuleType) -> None:
    module = any_module
    with pytest.raises(ValidationError, match="sparcity"):
        module.Config(sparcity=0.5)
    for name, field in module.Config.model_fields.items():
        if field.annotation is int:
            with pytest.raises(ValidationError, match="got True"):
                module.Config(**{name: True})
    config = module.Config(**module.SMALL)
    name = next(iter(module.SMALL))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, module.SMALL[name])
    assert module.Config() is not None  # the paper's values are defaults
    assert module.Config.model_validate(config.model_dump(mode="json")) == config


def test_a_model_that_no_memory_holds_is_refused(any_module: ModuleType) -> None:
    for name, field in any_module.Config.model_fields.items():
        whole = int in (get_args(field.annotation) or (field.annotation,))
        huge = [10**30, 10**30] if name == "block_out_channels" else 10**30
        if whole or name == "block_out_channels":
            with pytest.raises(ValidationError, match=r"less than or equal to|above the limit|multiple"):
                any_module.Config(**any_module.SMALL | {name: huge})


def test_prediction_is_like_x_and_finite(module: ModuleType) -> None:
    model, inputs = small(module)
    prediction = model(**inputs)
    assert prediction.shape == inputs["x"].shape
    assert prediction.dtype == torch.float32
    assert torch.isfinite(prediction).all()


def test_every_parameter_learns(module: ModuleType) -> None:
    model, inputs = small(module)
    with torch.no_grad():  # layers that start at zero would hide those below them
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=rng.generator(1, "contract")))
    model(**inputs).square().sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not idle


def test_it_can_be_sparse(module: ModuleType) -> None:
    assert maskable(small(module)[0])


def test_weights_are_a_function_of_the_seed(module: ModuleType) -> None:
    first, second, other = (small(module, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_building_and_running_draw_nothing_global(module: ModuleType) -> None:
    before = torch.random.get_rng_state()
    model, inputs = small(module)
    model(**inputs)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_same_input_same_bits(module: ModuleType) -> None:
    model, inputs = small(module)
    model.eval()
    assert torch.equal(model(**inputs), model(**inputs))


def test_the_state_goes_through_safetensors(module: ModuleType, tmp_path: Path) -> None:
    model, inputs = small(module)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other, _ = small(module, seed=1)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other.eval()(**inputs), model.eval()(**inputs))


def test_a_deep_copy_stands_alone(module: ModuleType) -> None:
    model, inputs = small(module)
    twin = copy.deepcopy(model)
    before = model.eval()(**inputs)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(**inputs), before)
    assert not twin.eval()(**inputs).any()


def test_costs_on_the_meta_device_equal_real_ones(module: ModuleType) -> None:
    config = module.Config(**module.SMALL)
    with torch.device("meta"):
        model = module.build(config, seed=0)
    macs = flops.forward_macs(model, module.example(config, 2, POINTS, device="meta"), batch=2)
    assert macs == flops.forward_macs(small(module)[0], module.example(config, 2, POINTS), batch=2)
    assert all(macs.values())
    assert flops.paper_convention(module).name == "paper"


def test_the_null_class_is_beyond_the_real_ones(module: ModuleType) -> None:
    """A model that can be guided says which label stands for none; it takes that label."""
    if "num_classes" not in module.Config.model_fields:
        assert getattr(small(module)[0], "null_label", None) is None
        return
    config = module.Config(**module.SMALL, num_classes=3)
    model = module.build(config, seed=0)
    null = getattr(model, "null_label", None)
    if null is not None:
        assert null == 3
        inputs = module.example(config, 2, POINTS)
        assert model(**inputs | {"labels": torch.tensor([null, 0])}).shape == inputs["x"].shape


def test_what_allocation_is_told_fits_the_weights(module: ModuleType) -> None:
    model, _ = small(module)
    weights = maskable(model)
    grouped = [name for group in getattr(model, "allocation_groups", ()) for name in group]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) <= set(weights)
    for name, shape in getattr(model, "allocation_shapes", {}).items():
        assert math.prod(shape) == weights[name].numel()
        assert shape[:2] == tuple(weights[name].shape[:2])


def test_latents_are_smaller_by_the_factor_and_decode_to_pictures(stage: ModuleType) -> None:
    config = stage.Config(**stage.SMALL)
    model = stage.build(config, seed=0)
    x = torch.rand(2, 3, 16, 24, generator=rng.generator(0, "contract")) * 2 - 1
    z = model.encode(x)
    assert z.shape == (2, config.channels, 16 // config.factor, 24 // config.factor)
    y = model.decode(z)
    assert y.shape == x.shape
    assert z.isfinite().all()
    assert y.isfinite().all()
    assert not torch.equal(y[0], y[1])
    assert torch.equal(model.encode(x), z)
    assert torch.equal(model.decode(z), y)


def test_a_first_stage_is_frozen(stage: ModuleType) -> None:
    model = stage.build(stage.Config(**stage.SMALL), seed=0)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_first_stage_is_a_function_of_the_seed_and_so_is_its_identity(stage: ModuleType) -> None:
    before = torch.random.get_rng_state()
    config = stage.Config(**stage.SMALL)
    first, second, other = (stage.build(config, seed=seed) for seed in (3, 3, 4))
    first.decode(first.encode(torch.zeros(1, 3, 16, 16)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert stage.identity(first) == stage.identity(second) != stage.identity(other)
    assert re.fullmatch("[0-9a-f]{64}", stage.identity(first))
    with torch.no_grad():
        next(iter(second.parameters())).view(-1)[0] += 1e-6
    assert stage.identity(first) != stage.identity(second)


def test_a_first_stage_can_be_built_without_memory(stage: ModuleType) -> None:
    with torch.device("meta"):
        model = stage.build(stage.Config(), seed=0)
        x = torch.zeros(1, 3, 64, 64)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.decode(model.encode(x)).shape == x.shape


def test_weights_that_are_nowhere_are_the_users_error(stage: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        stage.load(str(tmp_path / "nowhere"), stage.Config(**stage.SMALL))

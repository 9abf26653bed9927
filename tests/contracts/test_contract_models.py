"""What every model must do. A new file in raysparse/models/ joins by existing.

It needs Config, build, example and SMALL, the Config of a model that these tests can afford.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from raysparse import plugins, rng
from raysparse.metrics import flops
from raysparse.sparse.masks import maskable

POINTS = 7  # of a sketch; images ignore it


@pytest.fixture(params=plugins.names("models"))
def module(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("models", request.param)


def small(module: ModuleType, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model and random inputs for it."""
    config = module.Config(**module.SMALL)
    inputs = module.example(config, 2, POINTS, device="cpu")
    draw = rng.generator(0, "contract")
    inputs["x"] = torch.randn(inputs["x"].shape, generator=draw)
    inputs["timesteps"] = torch.tensor([0, 999])
    return module.build(config, seed=seed), inputs


def test_config_is_frozen_and_refuses_unknown_keys(module: ModuleType) -> None:
    with pytest.raises(ValidationError, match="sparcity"):
        module.Config(sparcity=0.5)
    config = module.Config(**module.SMALL)
    name = next(iter(module.SMALL))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, module.SMALL[name])
    assert module.Config() is not None  # the paper's values are defaults
    assert module.Config.model_validate(config.model_dump(mode="json")) == config


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

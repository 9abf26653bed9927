from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from raysparse.errors import UsageError
from raysparse.metrics import flops, params
from raysparse.models.ddpm_unet import SMALL, Config, build, example
from raysparse.sparse.masks import maskable


def test_counts_of_the_published_network() -> None:
    with torch.device("meta"):
        model = build(Config(), seed=0)
    assert params.count(model) == 35_746_307
    macs = flops.forward_macs(model, example(Config(), 1, 1, device="meta"), batch=1)
    assert round(sum(macs.values()) / 1e9, 2) == 6.05


def test_structure_of_the_published_network() -> None:
    with torch.device("meta"):
        unet = build(Config(), seed=0).unet
    assert (unet.config.flip_sin_to_cos, unet.config.freq_shift, unet.config.downsample_padding) == (False, 1, 0)
    assert {(m.num_groups, m.eps) for m in unet.modules() if isinstance(m, nn.GroupNorm)} == {(32, 1e-6)}
    attention = [m for m in unet.modules() if hasattr(m, "to_q")]
    assert [(m.heads, m.to_q.out_features) for m in attention] == [(1, 256)] * 6


def test_it_starts_as_the_original_does() -> None:
    model = build(Config(**SMALL), seed=0)
    zero = {name for name, p in model.named_parameters() if p.ndim > 1 and not p.any()}
    ends = (".conv2.weight", ".to_out.0.weight", "conv_out.weight")
    assert zero == {name for name, _ in model.named_parameters() if name.endswith(ends)}


def test_allocation_groups() -> None:
    model = build(Config(**SMALL), seed=0)
    assert len(model.allocation_groups) == 4
    assert all(name in maskable(model) for group in model.allocation_groups for name in group)
    assert model.allocation_shapes == {}


def test_it_has_no_classes() -> None:
    model = build(Config(**SMALL), seed=0)
    assert model.null_label is None
    with pytest.raises(UsageError, match="has no classes"):
        model(**example(model.config, 2, 1), labels=torch.tensor([0, 1]))


def test_a_first_level_too_narrow_for_time_features_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"begins with 2, .* NaN below 4"):
        Config(**SMALL | {"block_out_channels": (2, 4), "norm_num_groups": 1})
    model = build(Config(**SMALL | {"block_out_channels": (4, 4), "norm_num_groups": 1}), seed=0)
    assert model(**example(model.config, 2, 1)).isfinite().all()

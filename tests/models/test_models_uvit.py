"""U-ViT: the published sizes, what is sparse in it, and the arithmetic of its tokens."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from raysparse.errors import UsageError
from raysparse.metrics import flops, params
from raysparse.models.uvit import CELEBA64, IMAGENET256_LARGE, SMALL, Config, _unpatched, build, example, time_embedding
from raysparse.sparse import SparseEngine
from raysparse.sparse.masks import maskable


@pytest.mark.parametrize(
    ("options", "count"), [({}, 44_255_328), (CELEBA64, 44_292_228), (IMAGENET256_LARGE, 286_763_172)]
)
def test_counts_of_the_published_networks(options, count):
    config = Config(**options)
    with torch.device("meta"):
        model = build(config, seed=0)
    assert params.count(model) == count
    macs = flops.forward_macs(model, example(config, 1, 1, device="meta"), batch=1)
    tokens = model.positions.shape[1]
    names = ("qkv", "proj", "fc1", "fc2")
    sparse = sum(value for name, value in macs.items() if name.split(".")[-2] in names)
    assert sparse == (config.depth + 1) * 12 * config.embed_dim**2 * tokens


def test_what_is_sparse_is_what_sparsedm_makes_sparse():
    model = build(Config(**SMALL), seed=0)
    blocks = ["early.0", "middle", "late.0"]
    assert list(maskable(model)) == [f"{b}.{name}.weight" for b in blocks for name in ("qkv", "proj", "fc1", "fc2")]
    engine = SparseEngine(model, torch.optim.AdamW(model.parameters()), method="nm_ste", sparsity=0.5)
    assert engine.layout.dense == {}
    for name in engine.masks:
        assert (model.get_parameter(name).reshape(-1, 4).count_nonzero(1) == 2).all()


def test_it_starts_as_the_original_does():
    state = build(Config(**{**SMALL, "embed_dim": 64}), seed=0).state_dict()
    for name, value in state.items():
        if name.endswith(("qkv.weight", "fc1.weight", "positions", "decoder.weight")):
            assert value.std() == pytest.approx(0.02, rel=0.15)
        if name.endswith(("fc1.bias", "norm1.bias", "decoder.bias")):
            assert not value.any()
        if name.endswith("norm1.weight"):
            assert (value == 1).all()


def test_patches_go_back_where_they_came_from():
    config = Config(**SMALL)
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, 4, 4, 2, 2]
    assert torch.equal(_unpatched(patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 12), config), x)


def test_the_time_is_a_token():
    embedded = time_embedding(torch.tensor([0, 250]), 8)
    assert embedded[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert embedded[1, 1] == pytest.approx(torch.tensor(25.0).cos().item(), abs=1e-5)
    model = build(Config(**SMALL), seed=0).eval()
    x = torch.randn(1, 3, 8, 8)
    outputs = [model(x, torch.tensor([t])) for t in (0, 999)]
    assert not torch.equal(*outputs)


def test_each_late_block_is_joined_to_its_early_one():
    """The first block's output reaches the last one: without what it brings the output is another."""
    model = build(Config(**{**SMALL, "depth": 4}), seed=0).eval()
    seen = {}
    model.early[0].register_forward_hook(lambda module, args, output: seen.update(early=output))
    model.late[1].register_forward_pre_hook(lambda module, args: seen.update(late=args[1]))
    model(**example(model.config, 1, 1))
    assert seen["early"] is seen["late"]


def test_classes_are_tokens_and_the_null_class_is_known():
    config = Config(**SMALL, num_classes=3)
    model = build(config, seed=0).eval()
    given = example(config, 2, 1)
    given["x"] = torch.randn(given["x"].shape)
    assert not torch.equal(model(**given), model(**{**given, "labels": torch.tensor([3, 3])}))
    assert model.null_label == 3
    with pytest.raises(UsageError, match="labels must be in 0"):
        model(**{**given, "labels": torch.tensor([0, 4])})
    with pytest.raises(UsageError, match="given no labels"):
        model(given["x"], given["timesteps"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 9}, "no multiple of patch_size"),
        ({"num_heads": 3}, "multiple of num_heads 3"),
        ({"depth": 3}, "depth 3 must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Config(**{**SMALL, **options})


def test_another_picture_size_is_refused():
    with pytest.raises(UsageError, match=r"got \[1, 3, 16, 16\]"):
        build(Config(**SMALL), seed=0)(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))

"""What every sketch data set must do. A new file in raysparse/data/datasets/ joins by existing.

It needs SPEC, Options, prepare and tiny_source(folder), which writes a small source in its format (None: embedded).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from raysparse import plugins
from raysparse.data import prepared
from raysparse.data.sketch import Examples, SketchOptions, Spec
from raysparse.errors import UsageError

NAMES = [name for name in plugins.names("datasets") if plugins.load("datasets", name).SPEC.kind == "sketch"]


@pytest.fixture(scope="module", params=NAMES)
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Any]:
    module = plugins.load("datasets", request.param)
    return module, module.tiny_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


def splits(dataset: tuple[ModuleType, Any], root: Path, **options: Any) -> dict[str, Examples]:
    module, source = dataset
    folder = prepared.prepare(module.SPEC.name, options, source, root)
    return {name: prepared.open_split(folder, name) for name in prepared.SPLITS}


def test_it_says_what_it_is(dataset: tuple[ModuleType, Any]) -> None:
    spec, options = dataset[0].SPEC, dataset[0].Options
    assert isinstance(spec, Spec)
    assert spec.name == dataset[0].__name__.rpartition(".")[2]
    assert spec.kind == "sketch"
    assert all([spec.title, spec.licence, spec.citation, spec.source])
    assert set(spec.splits) == set(prepared.SPLITS)
    assert issubclass(options, SketchOptions)
    assert options.model_config["frozen"]
    assert options.model_config["extra"] == "forbid"
    assert all(file.url.startswith("https://") for file in spec.downloads)


def test_importing_it_needs_no_torch(dataset: tuple[ModuleType, Any]) -> None:
    check = f"import sys, {dataset[0].__name__} as m; m.Options(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_every_split_holds_examples_that_can_be_drawn(dataset: tuple[ModuleType, Any], root: Path) -> None:
    for data in splits(dataset, root).values():
        assert len(data) > 0
        assert (data.lengths >= 1).all()
        chosen = np.arange(min(len(data), 16))
        batch = data.batch(chosen)
        x, lengths = batch["x"], batch["cond"]["lengths"]
        assert x.dtype == torch.float32
        assert x.shape == (len(chosen), int(lengths.max()), 3)
        assert lengths.tolist() == data.lengths[chosen].tolist()
        assert x.isfinite().all()
        last = x[torch.arange(len(x)), lengths - 1]
        assert (last[:, 2] == 1).all()
        radius = x[..., :2].norm(dim=-1).amax(dim=1)
        assert (radius <= 10.001).all()
        images = data.images(chosen)
        assert images.dtype == torch.uint8
        assert images.shape == (len(chosen), 1, 64, 64)
        assert (images.flatten(1).min(dim=1).values < 64).all()
        assert (images.flatten(1).max(dim=1).values == 255).all()
        assert torch.equal(data.to_images(x, batch["cond"]), images)


def test_validation_examples_are_not_trained_on(dataset: tuple[ModuleType, Any], root: Path) -> None:
    parts = splits(dataset, root)
    seen = {row.tobytes() for row in _sketches(parts["train"])}
    assert not seen & {row.tobytes() for row in _sketches(parts["validation"])}


def _sketches(data: Examples) -> list[np.ndarray]:
    return [data.points[a:b] for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)]


def test_differences_are_the_same_sketches(dataset: tuple[ModuleType, Any], root: Path) -> None:
    absolute, difference = splits(dataset, root)["train"], splits(dataset, root, representation="del")["train"]
    assert absolute.content_hash == difference.content_hash
    chosen = np.arange(min(len(absolute), 8))
    a, d = absolute.batch(chosen), difference.batch(chosen)
    inside = torch.arange(a["x"].shape[1]) < a["cond"]["lengths"][:, None]
    torch.testing.assert_close(d["x"][..., :2].cumsum(1)[inside], a["x"][..., :2][inside], atol=1e-4, rtol=0)
    assert torch.equal(a["x"][..., 2], d["x"][..., 2])
    assert torch.equal(absolute.images(chosen), difference.images(chosen))


def test_preparing_again_gives_the_same(dataset: tuple[ModuleType, Any], root: Path, tmp_path: Path) -> None:
    first, second = splits(dataset, root), splits(dataset, tmp_path)
    assert {k: v.content_hash for k, v in first.items()} == {k: v.content_hash for k, v in second.items()}
    coarse = splits(dataset, root, spacing=0.3)["train"]
    assert coarse.lengths.mean() < first["train"].lengths.mean()
    assert coarse.content_hash != first["train"].content_hash


def test_bad_options_and_a_missing_source(dataset: tuple[ModuleType, Any], tmp_path: Path) -> None:
    module, source = dataset
    with pytest.raises(UsageError, match="did you mean 'spacing'"):
        prepared.prepare(module.SPEC.name, {"spaceing": 1}, source, tmp_path)
    for bad in ({"spacing": 0}, {"spacing": 1.5}, {"point_limit": 0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            prepared.prepare(module.SPEC.name, bad, source, tmp_path)
    with pytest.raises(UsageError, match="representation"):
        prepared.prepare(module.SPEC.name, {"representation": "rel"}, source, tmp_path)
    with pytest.raises(UsageError, match="nowhere"):
        prepared.prepare(module.SPEC.name, {}, tmp_path / "nowhere", tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name != "sources"] == []

"""What every data set must do: sketches in the first half, pictures in the second. A new file in
raysparse/data/datasets/ joins by existing.

It needs SPEC, Options, tiny_source(folder), which writes a small source in its format (None: embedded), and `prepare`
(sketches) or `find` (pictures).
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
from raysparse.data.image import ImageOptions, Latents, Pictures
from raysparse.data.sketch import Examples, SketchOptions, Spec
from raysparse.errors import UsageError

KINDS = {name: plugins.load("datasets", name).SPEC.kind for name in plugins.names("datasets")}
NAMES = [name for name, kind in KINDS.items() if kind == "sketch"]
IMAGE_NAMES = [name for name, kind in KINDS.items() if kind == "image"]


def test_every_data_set_is_of_a_kind_that_is_tested_here() -> None:
    assert sorted(NAMES + IMAGE_NAMES) == plugins.names("datasets")


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
    for bad in ({"spacing": 0}, {"spacing": 1.5}, {"point_limit": 0}, {"point_limit": True}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            prepared.prepare(module.SPEC.name, bad, source, tmp_path)
    with pytest.raises(UsageError, match="representation"):
        prepared.prepare(module.SPEC.name, {"representation": "rel"}, source, tmp_path)
    with pytest.raises(UsageError, match="nowhere"):
        prepared.prepare(module.SPEC.name, {}, tmp_path / "nowhere", tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name != "sources"] == []


# Pictures

COUNTS = {"train_examples": 12, "validation_examples": 4, "reference_examples": 6}


class HalfSize:
    """A first stage for tests: every other pixel."""

    identity = "half size"

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        return 3, size_px // 2, size_px // 2

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return (pictures[..., ::2, ::2].float() / 127.5 - 1).half()


@pytest.fixture(scope="module", params=IMAGE_NAMES)
def image_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Any]:
    module = plugins.load("datasets", request.param)
    return module, module.tiny_source(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("image_root")


def image_splits(
    image_set: tuple[ModuleType, Any], root: Path, encoder: HalfSize | None = None, **options: Any
) -> dict[str, Any]:
    module, source = image_set
    folder = prepared.prepare(module.SPEC.name, COUNTS | options, source, root, encoder=encoder)
    prepared.verify(folder)
    return {name: prepared.open_split(folder, name) for name in prepared.SPLITS}


def test_an_image_set_says_what_it_is(image_set: tuple[ModuleType, Any]) -> None:
    module, options = image_set[0], image_set[0].Options
    spec = module.SPEC
    assert isinstance(spec, Spec)
    assert spec.name == module.__name__.rpartition(".")[2]
    assert all([spec.title, spec.licence, spec.citation, spec.source])
    assert set(spec.splits) == set(prepared.SPLITS)
    assert issubclass(options, ImageOptions)
    assert options.model_config["frozen"]
    assert options.model_config["extra"] == "forbid"
    assert all(file.url.startswith("https://") and (file.sha256 or file.md5) for file in spec.downloads)


def test_importing_an_image_set_needs_no_torch(image_set: tuple[ModuleType, Any]) -> None:
    check = f"import sys, {image_set[0].__name__} as m; m.Options(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_every_split_holds_pictures(image_set: tuple[ModuleType, Any], image_root: Path) -> None:
    splits, side = image_splits(image_set, image_root), image_set[0].Options().size_px
    assert [len(splits[name]) for name in prepared.SPLITS] == list(COUNTS.values())
    for name, data in splits.items():
        assert isinstance(data, Pictures)
        chosen = np.arange(len(data))
        images = data.images(chosen)
        assert images.dtype == torch.uint8
        assert images.shape == (len(data), *data.value_shape) == (len(data), 3, side, side)
        assert images.float().flatten(1).std(dim=1).min() > 1  # no picture is of one colour
        batch = data.batch(chosen)
        assert batch["x"].dtype == torch.float32
        assert batch["cond"] == {}
        assert torch.equal(data.to_images(batch["x"], {}), images)
        mirrored = data.batch(chosen, chosen % 2 == 0)["x"]
        assert torch.equal(mirrored[::2], batch["x"][::2].flip(-1))
        assert torch.equal(mirrored[1::2], batch["x"][1::2])
        assert data.flips == (image_set[0].Options().flips and name == "train")
        assert torch.equal(data.first(2).images([0, 1]), images[:2])


def test_validation_pictures_are_not_trained_on(image_set: tuple[ModuleType, Any], image_root: Path) -> None:
    splits = image_splits(image_set, image_root)
    found = {name: {image.numpy().tobytes() for image in splits[name].images(range(4))} for name in splits}
    assert not found["train"] & found["validation"]


def test_latents_are_of_the_same_pictures(image_set: tuple[ModuleType, Any], image_root: Path) -> None:
    pixels = image_splits(image_set, image_root, flips=True)
    latents = image_splits(image_set, image_root, HalfSize(), flips=True)
    for name in ("train", "validation"):
        assert isinstance(latents[name], Latents)
        assert len(latents[name]) == len(pixels[name])
        flips = np.arange(len(latents[name])) % 3 == (0 if name == "train" else 3)
        pictures = pixels[name].images(range(len(pixels[name])))
        pictures[torch.from_numpy(flips)] = pictures[torch.from_numpy(flips)].flip(-1)
        x = latents[name].batch(range(len(latents[name])), flips)["x"]
        assert x.shape[1:] == latents[name].value_shape
        assert torch.equal(x, HalfSize()(pictures).float())
    assert latents["reference"].images_hash == pixels["reference"].images_hash
    assert torch.equal(latents["reference"].images(range(6)), pixels["reference"].images(range(6)))


def test_classes_where_there_are_any(image_set: tuple[ModuleType, Any], image_root: Path) -> None:
    extra = {"classes": 2} if "classes" in image_set[0].Options.model_fields else {}
    if "class" not in image_set[0].SPEC.source:
        with pytest.raises(UsageError, match="conditional"):
            image_splits(image_set, image_root, conditional=True)
        return
    train = image_splits(image_set, image_root, conditional=True, **extra)["train"]
    assert train.num_classes > 1
    assert train.labels.dtype == np.int64
    assert 0 <= train.labels.min() <= train.labels.max() < train.num_classes
    batch = train.batch(np.arange(len(train)))
    assert batch["cond"]["labels"].tolist() == train.labels.tolist()
    shape, cond = train.draw_conditions(50, np.random.default_rng(0))
    assert shape == (50, *train.value_shape)
    assert set(cond["labels"].tolist()) <= set(train.labels.tolist())


def test_pictures_prepared_again_are_the_same(
    image_set: tuple[ModuleType, Any], image_root: Path, tmp_path: Path
) -> None:
    first, second = image_splits(image_set, image_root), image_splits(image_set, tmp_path)
    for name in prepared.SPLITS:
        assert first[name].content_hash == second[name].content_hash
        assert first[name].images_hash == second[name].images_hash
    fewer = image_splits(image_set, tmp_path, train_examples=11)
    assert fewer["train"].content_hash != first["train"].content_hash
    assert fewer["validation"].content_hash == first["validation"].content_hash


def test_bad_image_options_and_a_missing_source(image_set: tuple[ModuleType, Any], tmp_path: Path) -> None:
    module, source = image_set
    with pytest.raises(UsageError, match="did you mean 'size_px'"):
        prepared.prepare(module.SPEC.name, {"sise_px": 1}, source, tmp_path)
    for bad in ({"size_px": 0}, {"resize": "crop"}, {"train_examples": 0}, {"filter": "best"}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            prepared.prepare(module.SPEC.name, bad, source, tmp_path)
    with pytest.raises(UsageError, match="nowhere"):
        prepared.prepare(module.SPEC.name, {}, tmp_path / "nowhere", tmp_path)
    with pytest.raises(UsageError, match=r"train_examples 9999999.*set a smaller"):
        prepared.prepare(module.SPEC.name, COUNTS | {"train_examples": 9_999_999}, source, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name != "sources"] == []

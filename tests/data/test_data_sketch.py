"""Examples: batches, drawn images, conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysparse.data import drawing, synthetic
from raysparse.data.preprocess import Strokes, normalise
from raysparse.data.sketch import Examples, Representation


def examples(representation: Representation = "abs", labels: bool = False) -> Examples:
    found = normalise(Strokes.of(synthetic.doodles(50)), spacing=0.1)
    n = len(found.lengths)
    return Examples(
        points=found.points,
        offsets=np.concatenate([[0], np.cumsum(found.lengths)]),
        labels=np.arange(n) % 3 if labels else None,
        num_classes=3 if labels else 0,
        representation=representation,
        content_hash="0",
    )


def by_hand(representation: Representation) -> Examples:
    points = np.array([[1, 2, 0], [3, 5, 1], [4, 4, 0], [-1, 0, 1], [2, 2, 1]], np.float32)
    return Examples(points, np.array([0, 4, 5]), None, 0, representation, "0")


def test_batch_by_hand() -> None:
    batch = by_hand("abs").batch(np.array([1, 0]))
    assert batch["x"].tolist() == [
        [[2, 2, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[1, 2, 0], [3, 5, 1], [4, 4, 0], [-1, 0, 1]],
    ]
    assert batch["cond"]["lengths"].tolist() == [1, 4]
    assert batch["x"].dtype == torch.float32
    assert batch["cond"]["lengths"].dtype == torch.int64
    assert "labels" not in batch["cond"]


def test_differences_by_hand() -> None:
    batch = by_hand("del").batch(torch.tensor([1, 0]))
    assert batch["x"].tolist() == [
        [[2, 2, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[1, 2, 0], [2, 3, 1], [1, -1, 0], [-5, -4, 1]],
    ]


@pytest.mark.parametrize("representation", ["abs", "del"])
def test_a_batch_drawn_equals_the_real_images(representation: Representation) -> None:
    data = examples(representation)
    chosen = np.random.default_rng(0).integers(0, len(data), 20)
    batch = data.batch(chosen)
    drawn, real = data.to_images(batch["x"], batch["cond"]), data.images(chosen)
    assert real.dtype == torch.uint8
    assert real.shape == (20, 1, 64, 64)
    # differences are summed again in other roundings: a disc may fall into the next 1/16 px
    assert (drawn.int() - real.int()).abs().float().mean() < 0.05
    assert (drawn != real).float().mean() < 0.005


@pytest.mark.parametrize("representation", ["abs", "del"])
def test_padding_and_diverged_samples(representation: Representation) -> None:
    data = examples(representation)
    batch = data.batch(np.arange(8))
    x, cond = batch["x"], batch["cond"]
    beyond = torch.arange(x.shape[1]) >= cond["lengths"][:, None]
    assert (x[beyond] == 0).all()
    plain = data.to_images(x, cond)
    x[beyond] = 99.0  # nothing beyond a length is drawn
    assert torch.equal(data.to_images(x, cond), plain)
    broken = x.clone()
    broken[0] = torch.nan
    broken[1, 3] = torch.inf
    images = data.to_images(broken, cond)
    assert torch.equal(images[2:], plain[2:])
    assert torch.equal(x, x.nan_to_num())  # the caller's tensor is left alone


def test_to_images_leaves_its_input_alone() -> None:
    data = examples("del")
    batch = data.batch(np.arange(4))
    before = batch["x"].clone()
    data.to_images(batch["x"], batch["cond"])
    assert torch.equal(batch["x"], before)


def test_conditions_are_drawn_from_the_examples() -> None:
    data = examples(labels=True)
    shape, cond = data.draw_conditions(2000, np.random.default_rng(0))
    assert shape == (2000, int(cond["lengths"].max()), 3)
    pairs = set(zip(data.lengths.tolist(), data.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert set(zip(cond["lengths"].tolist(), cond["labels"].tolist(), strict=True)) == pairs
    again = data.draw_conditions(2000, np.random.default_rng(0))[1]
    assert torch.equal(again["lengths"], cond["lengths"])
    assert cond["labels"].dtype == cond["lengths"].dtype == torch.int64


def test_labels_follow_their_examples() -> None:
    data = examples(labels=True)
    assert data.batch(np.array([4, 0, 2]))["cond"]["labels"].tolist() == [1, 0, 2]
    assert len(data) == len(data.lengths) == 50
    assert data.lengths.dtype == np.int32


def test_the_images_hash_changes_with_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    sketches = examples()
    before = sketches.images_hash
    assert sketches.content_hash in before
    monkeypatch.setattr(drawing, "VERSION", drawing.VERSION + 1)
    assert sketches.images_hash != before


def test_the_first_so_many() -> None:
    data = examples(labels=True)
    few = data.first(7)
    assert len(few) == 7
    assert few.lengths.tolist() == data.lengths[:7].tolist()
    assert few.labels is not None
    assert data.labels is not None
    assert few.labels.tolist() == data.labels[:7].tolist()
    assert torch.equal(few.images(range(7)), data.images(range(7)))
    assert few.content_hash != data.content_hash
    assert few.first(7) is few
    assert data.first(10**9) is data

"""Quick, Draw!: categories, classes, splits, and lines that are no drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysparse.data import prepared
from raysparse.data.datasets import quickdraw
from raysparse.data.sketch import Examples
from raysparse.errors import UsageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return quickdraw.tiny_source(folder)


def opened(source: Path, split: str = "train", **options: Any) -> Examples:
    return prepared.open_split(prepared.prepare("quickdraw", options, source, source.parent / "root"), split)


def test_default_categories_are_the_papers() -> None:
    assert quickdraw.Options().chosen == ("cat", "crab", "mosquito")
    assert quickdraw.Options(conditional=True).chosen[3:] == ("bus", "flower", "yoga", "fish")


def test_splits(source: Path) -> None:
    sizes = {split: len(opened(source, split)) for split in prepared.SPLITS}
    assert sizes == {"train": 54, "validation": 6, "reference": 54}
    assert len(opened(source, "reference", reference_examples=20)) == 20
    assert len(opened(source, "validation", validation_examples=2)) == 2
    assert len(opened(source, categories=["crab"])) == 18
    assert len(opened(source, per_category=5)) == 14


def test_labels_follow_the_order_of_the_categories(source: Path) -> None:
    plain = opened(source)
    assert plain.labels is None
    assert plain.num_classes == 0
    both = opened(source, conditional=True, categories=["mosquito", "cat"])
    assert both.num_classes == 2
    only = opened(source, conditional=True, categories=["mosquito"])
    mosquitos = {only.points[a:b].tobytes() for a, b in zip(only.offsets[:-1], only.offsets[1:], strict=True)}
    assert both.labels is not None
    assert 0 < both.labels.sum() < len(both)
    for label, start, end in zip(both.labels, both.offsets[:-1], both.offsets[1:], strict=True):
        if both.points[start:end].tobytes() in mosquitos:
            assert label == 0
    assert both.batch(np.arange(3))["cond"]["labels"].tolist() == both.labels[:3].tolist()


def test_recognized_only(source: Path) -> None:
    path = source / "cat.ndjson"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records[::2]:
        record["recognized"] = False
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert len(opened(source, categories=["cat"], validation_examples=1)) == 19
    assert len(opened(source, categories=["cat"], validation_examples=1, recognized_only=True)) == 9


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"drawing": [[[1, 2', "Expecting|Unterminated"),
        ("\x80", "decode|Expecting"),
        ("[]", "list indices"),
        ('{"word": "cat"}', "no 'drawing'"),
        ('{"drawing": [[[1, 2], [3, 4]]]}', "simplified files lack t"),
        ('{"drawing": [[[1, 2], [3], [0, 1]]]}', "inhomogeneous"),
        ('{"drawing": [[[1, 2], [3, 4], [0]]]}', "of one length"),
        ('{"drawing": [[[1, NaN], [3, 4], [0, 1]]]}', "finite"),
        ('{"drawing": [[["1", "2"], [3, 4], [0, 1]]]}', "finite numbers"),
        ('{"drawing": [[[1, 2], [true, 4], [0, 1]]]}', "finite numbers"),
        ('{"drawing": [[["a", 1], [3, 4], [0, 1]]]}', "could not convert"),
        ('{"drawing": [[[1, 1' + "0" * 400 + "], [3, 4], [0, 1]]]}", "too large"),
        ('{"drawing": 5}', "not iterable"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(source: Path, line: str, reason: str) -> None:
    path = source / "crab.ndjson"
    lines = path.read_text().splitlines()
    lines[6] = line
    path.write_text("\n".join(lines), encoding="latin1")
    with pytest.raises(UsageError, match=rf"crab.ndjson:7: not a raw Quick, Draw! drawing \(.*({reason})"):
        opened(source)
    assert [p.name for p in (source.parent / "root").iterdir()] == ["sources"]


def test_missing_files_and_no_examples(source: Path) -> None:
    with pytest.raises(UsageError, match=r"dog.ndjson does not exist \(there: cat, crab, mosquito\)"):
        opened(source, categories=["dog"])
    with pytest.raises(UsageError, match=r"there: no \.ndjson file"):
        opened(source.parent / "nowhere")
    (source / "cat.ndjson").write_text('{"drawing": [[[1], [2], [0]]]}\n')
    with pytest.raises(UsageError, match="no examples"):
        opened(source, categories=["cat"])


def test_a_category_named_twice_is_refused(source: Path) -> None:
    """Its drawings would be in training and in validation."""
    with pytest.raises(UsageError, match="categories: cat is there more than once"):
        opened(source, categories=["cat", "crab", "cat"])


def test_a_changed_source_is_another_data_set(source: Path) -> None:
    first = opened(source).content_hash
    path = source / "cat.ndjson"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert opened(source).content_hash != first


def test_progress_counts_the_bytes_of_all_files(source: Path, tmp_path: Path) -> None:
    path = source / "cat.ndjson"
    path.write_text(path.read_text() * 150)
    seen: list[tuple[int, int]] = []
    prepared.prepare("quickdraw", {}, source, tmp_path / "r", progress=lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in source.iterdir())
    assert seen
    assert all(0 < done <= total == t for done, t in seen)

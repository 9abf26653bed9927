"""A manifest that somebody damaged: said as such, wherever it is read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_pictures import manifest, prepare

from raysparse.data import prepared
from raysparse.data.image import Latents
from raysparse.errors import UsageError
from raysparse.sweep import encode

OTHERS: tuple[Any, ...] = ([], {}, 3, -1, 10**9, "x", None, 1.5, True, [1], {"x": 1})
GONE = object()


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.prepare("hershey", root=tmp_path_factory.mktemp("sketches"))


@pytest.fixture(params=["sketches", "pixels", "latents"])
def folder(request: pytest.FixtureRequest, source: Path, sketches: Path, tmp_path: Path) -> Path:
    if request.param == "sketches":
        return Path(shutil.copytree(sketches, tmp_path / "copy"))
    return prepare(source, tmp_path, conditional=True, **({"encoder": None} if request.param == "pixels" else {}))


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of the whole and of every part of it; of a list the first alone."""
    yield at
    for name in node if isinstance(node, dict) else range(min(1, len(node))) if isinstance(node, list) else ():
        yield from places(node[name], (*at, name))


def changed(whole: dict[str, Any], at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    outer = {"it": copy.deepcopy(whole)}
    *way, last = "it", *at
    node: Any = outer
    for name in way:
        node = node[name]
    if value is GONE:
        del node[last]
    else:
        node[last] = value
    return outer["it"]


def use(folder: Path) -> None:
    """All that reads a manifest."""
    encode.facts(folder)
    prepared.damaged(folder)
    for name in prepared.SPLITS:
        split = prepared.open_split(folder, name)
        split.batch(np.array([0, len(split) - 1]))
        if not isinstance(split, Latents):  # those have none
            split.images([0])


def test_any_other_value_at_any_place_is_told_as_damage_or_does_no_harm(folder: Path) -> None:
    path, whole = folder / "manifest.json", manifest(folder)
    told = []
    for at in places(whole):
        for value in (*OTHERS, GONE):
            path.write_text(json.dumps(changed(whole, at, None if value is GONE and not at else value)))
            try:
                use(folder)
            except UsageError as error:
                told.append(str(error))
    path.write_text(json.dumps(whole))
    use(folder)
    prepared.verify(folder)
    assert len(told) > 200
    assert all("delete" in words for words in told)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrays": []}, r"arrays: got \[\]: input should be an object"),
        ({"arrays": {"points": {"bytes": 1, "sha256": ""}}}, "arrays: those are points, offsets and, .*; got points"),
        ({"splits": {"train": 3}}, "splits.train: got 3: input should be an object"),
        ({"splits": {}}, "splits: train, validation, reference missing"),
        ({"classes": 5}, "classes: got 5: input should be a valid array"),
        ({"options": {"representation": "x"}}, "options.representation: got 'x': input should be 'abs' or 'del'"),
    ],
)
def test_the_place_is_named_with_how_to_make_the_folder_again(
    changes: dict[str, Any], words: str, sketches: Path, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(sketches) | changes))
    with pytest.raises(UsageError, match=rf"manifest\.json is damaged \({words}.*; delete the folder .* again$"):
        prepared.open_split(tmp_path, "train")


def test_pictures_of_classes_that_the_manifest_does_not_name(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path, conditional=True)
    (folder / "manifest.json").write_text(json.dumps(manifest(folder) | {"classes": ["a"]}))
    with pytest.raises(UsageError, match=r"damaged \(1 classes, but the labels go to 1\); delete the folder"):
        prepared.open_split(folder, "train")

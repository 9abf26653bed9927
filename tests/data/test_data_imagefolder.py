"""Any folder of pictures: names, links, classes, splits, and what is wrong with a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysparse.data import class_folders, listing, prepared
from raysparse.data.datasets import imagefolder
from raysparse.data.listing import Listing
from raysparse.errors import UsageError


def find(source: Path, root: Path, **options: Any) -> Listing:
    checked = prepared.check_options("imagefolder", {"size_px": 8, "validation_examples": 2} | options)
    assert isinstance(checked, imagefolder.Options)
    return imagefolder.find(checked, source=source, root=root)


def draw(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        class_folders.draw_one(folder / name, seed, (8, 8))
    return folder


def ids(found: Listing) -> set[str]:
    return {*found.train.ids, *found.validation.ids}


def test_any_suffix_case_depth_and_name(tmp_path: Path) -> None:
    names = ("a.png", "b.JPG", "deep/er/c.jPeG", "d.WebP", "äöü/日本 ☃.bmp", "e.f.png", " .png")
    source = draw(tmp_path / "s", *names, ".hidden.png", ".folder/x.png")
    (source / "readme.txt").write_text("")
    (source / "animation.gif").write_text("")
    found = find(source, tmp_path)
    assert ids(found) == set(names)
    assert found.facts == {"pictures": 7, "other_files": 2}
    folder = prepared.prepare("imagefolder", {"size_px": 8, "validation_examples": 2}, source, tmp_path)
    kept = [name for split in ("train", "validation") for name in prepared.open_split(folder, split).table.values("id")]
    assert set(kept) == set(names)


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", "a.png", "b.png")
    odd = os.fsdecode(os.fsencode(source) + b"/odd\xff.png")
    try:
        os.rename(source / "b.png", odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    Path(os.fsdecode(os.fsencode(source) + b"/bad\xfe.png")).write_text("x")
    folder = prepared.prepare("imagefolder", {"size_px": 8, "validation_examples": 1}, source, tmp_path)
    assert [name for name, _ in prepared.damaged(folder)] == ["bad\\xfe.png"]
    names = [
        name for split in ("train", "validation") for name in prepared.open_split(folder, split).table.values("id")
    ]
    assert sorted(names) == ["a.png", "odd\\xff.png"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", "a.png", "inner/b.png")
    elsewhere = draw(tmp_path / "elsewhere", "c.png", "more/d.png")
    (source / "linked").symlink_to(elsewhere)
    (source / "one.png").symlink_to(elsewhere / "c.png")
    (source / "inner" / "loop").symlink_to(source)
    (elsewhere / "back").symlink_to(source / "inner")
    (source / "gone.png").symlink_to(source / "nothing.png")
    found = find(source, tmp_path)
    assert {"a.png", "one.png", "linked/c.png", "linked/more/d.png", "gone.png"} <= ids(found)
    assert sum(name.endswith("b.png") for name in ids(found)) == 1
    folder = prepared.prepare("imagefolder", {"size_px": 8, "validation_examples": 1}, source, tmp_path)
    assert prepared.damaged(folder) == [("gone.png", "no such file or directory")]


def test_pipes_and_devices_are_no_pictures(tmp_path: Path) -> None:
    """Reading a pipe waits for ever, and /dev/zero has no end."""
    draw(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert listing.find(tmp_path) == (["a.png", "loop.png"], 2)


def test_the_split_is_fixed_and_validation_stays(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", *(f"{i:03d}.png" for i in range(60)))
    whole = find(source, tmp_path, validation_examples=None)
    assert (len(whole.train), len(whole.validation), len(whole.reference)) == (54, 6, 54)
    assert len(ids(whole)) == 60
    fewer = find(source, tmp_path, validation_examples=6, train_examples=20, reference_examples=5)
    assert list(fewer.validation.ids) == list(whole.validation.ids)
    assert list(fewer.train.ids) == list(whole.train.ids)[:20]
    assert list(fewer.reference.ids) == list(whole.train.ids)[:5]
    assert list(whole.train.ids) != sorted(whole.train.ids)
    assert list(find(source, tmp_path / "other", validation_examples=None).train.ids) == list(whole.train.ids)


def test_the_source_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", *(f"{i}.png" for i in range(9)))
    first = find(source, tmp_path).source_hash
    os.utime(source / "3.png", (0, 0))
    assert find(source, tmp_path).source_hash == first
    changed = (source / "3.png").read_bytes()
    (source / "3.png").write_bytes(changed[:-1] + b"x")
    assert find(source, tmp_path).source_hash != first
    (source / "3.png").write_bytes(changed)
    assert find(source, tmp_path).source_hash == first
    (source / "3.png").rename(source / "3a.png")
    assert find(source, tmp_path).source_hash != first


@pytest.mark.parametrize("validation", class_folders.VALIDATION_NAMES)
def test_folders_named_for_splits(tmp_path: Path, validation: str) -> None:
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(3)] + [f"{validation}/b/x.png", f"{validation}/a/y.png"]
    source = draw(tmp_path / "s", *names)
    found = find(source, tmp_path, conditional=True, validation_examples=None)
    assert set(found.train.ids) == set(names[:6])
    assert set(found.validation.ids) == set(names[6:])
    assert found.classes == ("a", "b")
    for entries in (found.train, found.validation):
        assert entries.labels is not None
        assert ["ab"[label] for label in entries.labels] == [name.split("/")[1] for name in entries.ids]


def test_train_alone_is_no_split(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", "train/a.png", "train/b.png", "more/c.png")
    assert len(ids(find(source, tmp_path, validation_examples=1))) == 3


def test_classes_are_the_first_folders_sorted(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", "b/1.png", "b/deep/2.png", "a/3.png", "ä/4.png")
    found = find(source, tmp_path, conditional=True, validation_examples=1)
    assert found.classes == ("a", "b", "ä")
    whole = {**_labels(found.train), **_labels(found.validation)}
    assert whole == {"b/1.png": 1, "b/deep/2.png": 1, "a/3.png": 0, "ä/4.png": 2}


def _labels(entries: listing.Entries) -> dict[str, int]:
    assert entries.labels is not None
    return dict(zip(entries.ids, entries.labels.tolist(), strict=True))


def bad_folders(tmp_path: Path) -> dict[str, tuple[Path, dict[str, Any], str]]:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("")
    two = draw(tmp_path / "two", "a.png", "b.png")
    mixed = draw(tmp_path / "mixed", "a/1.png", "b/2.png", "loose.png")
    hollow = draw(tmp_path / "hollow", "a/1.png", "b/2.png")
    (hollow / "c").mkdir()
    strange = draw(tmp_path / "strange", "train/a/1.png", "train/b/1.png", "val/c/1.png")
    return {
        "nowhere": (tmp_path / "nowhere", {}, "nowhere is not a folder"),
        "a file": (two / "a.png", {}, r"a.png is not a folder"),
        "empty": (empty, {}, r"empty has no pictures \(.*; 0 other files\); expected: a folder of .png"),
        "only text": (text, {}, r"text has no pictures \(.*1 other files"),
        "too few": (two, {"train_examples": 5}, r"two has 2 pictures, but the options ask for train_examples 5"),
        "one left": (two, {}, r"two has 2 pictures, but .* validation_examples 2, 3 in all"),
        "reference": (two, {"validation_examples": 1, "reference_examples": 2}, r"reference_examples is 2, .* are 1"),
        "no classes": (two, {"conditional": True}, "two has no folder per class"),
        "loose": (mixed, {"conditional": True}, r"loose.png is in no class folder"),
        "hollow": (hollow, {"conditional": True}, r"class folder .*hollow/c has no pictures"),
        "unknown class": (
            strange,
            {"conditional": True, "validation_examples": 1},
            r"c/1.png: its folder 'c' is none of",
        ),
    }


@pytest.mark.parametrize(
    "case",
    ["nowhere", "a file", "empty", "only text", "too few", "one left", "reference", "no classes", "loose", "hollow",
     "unknown class"],
)  # fmt: skip
def test_what_is_wrong_with_a_folder(case: str, tmp_path: Path) -> None:
    source, options, message = bad_folders(tmp_path)[case]
    with pytest.raises(UsageError, match=message):
        find(source, tmp_path, **options)


def test_no_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"imagefolder needs --path \(data.source\)"):
        prepared.prepare("imagefolder", {}, None, tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", "a.png", "closed/b.png")
    (source / "closed").chmod(0)
    try:
        if os.access(source / "closed", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(UsageError, match=r"cannot read .*closed \(Permission denied\)"):
            find(source, tmp_path)
    finally:
        (source / "closed").chmod(0o755)


def test_class_ids_out_of_range() -> None:
    entries = listing.Entries([0, 1], ["x", "y"], np.array([0, 3]))
    with pytest.raises(UsageError, match=r"y: its class id 3 is out of range; there are 3 classes, 0 to 2"):
        listing.check_labels(entries, ("a", "b", "c"))
    with pytest.raises(UsageError, match="class id -1"):
        listing.check_labels(listing.Entries([0], ["x"], np.array([-1])), ("a",))


def test_the_manifest_says_what_was_found(tmp_path: Path) -> None:
    source = draw(tmp_path / "s", *(f"{i}.png" for i in range(5)))
    folder = prepared.prepare("imagefolder", {"size_px": 8, "validation_examples": 1}, source, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "image"
    assert manifest["facts"] == {"pictures": 5, "other_files": 0}
    assert (manifest["size_px"], manifest["encoder"], manifest["damaged"]) == (8, None, [])
    assert {name: split["rows"] for name, split in manifest["splits"].items()} == {
        "train": 4, "validation": 1, "reference": 4,
    }  # fmt: skip
    assert set(manifest["files"]) == {"train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"}

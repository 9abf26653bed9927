"""Damaged pictures and damaged folders of pictures: named, counted, with what to do."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pictures import pixels_of, prepare
from toy_encoder import ToyEncoder

from raysparse.data import prepared, table
from raysparse.errors import UsageError


@pytest.fixture
def damaged_source(source: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(source, copy)
    (copy / "a" / "0003.png").write_bytes((copy / "a" / "0003.png").read_bytes()[:100])
    (copy / "b" / "0044.png").write_text("text")
    return copy


@pytest.mark.parametrize("encoder", [ToyEncoder(), None])
def test_damaged_pictures_are_named_and_counted(
    damaged_source: Path, source: Path, tmp_path: Path, encoder: ToyEncoder | None
) -> None:
    folder = prepare(damaged_source, tmp_path, encoder=encoder)
    found = dict(prepared.damaged(folder))
    assert set(found) == {"a/0003.png", "b/0044.png"}
    assert found["b/0044.png"] == "not a PNG, JPEG, WebP or BMP picture"
    splits = {name: prepared.open_split(folder, name) for name in prepared.SPLITS}
    assert len(splits["train"]) + len(splits["validation"]) == 98
    assert len(splits["reference"]) == len(splits["train"])
    names = splits["reference"].table.values("id")[: len(splits["reference"])]
    assert torch.equal(splits["reference"].images(range(len(names))), pixels_of(source, names))
    prepared.verify(folder)
    whole = prepare(source, tmp_path, encoder=encoder)
    assert prepared.damaged(whole) == []


def test_a_damaged_picture_inside_a_smaller_reference(damaged_source: Path, tmp_path: Path) -> None:
    """The reference are the first 60 of the list, less what is damaged among them."""
    whole = prepare(damaged_source, tmp_path, encoder=None)
    part = prepare(damaged_source, tmp_path, encoder=None, reference_examples=60)
    latent = prepare(damaged_source, tmp_path, reference_examples=60)
    a, b, c = (prepared.open_split(folder, "reference") for folder in (whole, part, latent))
    assert len(b) == len(c) <= 60
    assert torch.equal(b.images(range(len(b))), a.images(range(len(b))))
    assert b.images_hash == c.images_hash


def test_nothing_but_damage(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(5):
        (tmp_path / "bad" / f"{i}.png").write_text("x")
    with pytest.raises(
        UsageError, match=r"no picture of train, validation, reference can be read, 5 are damaged \(.*not"
    ):
        prepare(tmp_path / "bad", tmp_path / "root", validation_examples=1)
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["sources"]


def test_a_wrong_size_is_found_before_anything_is_encoded(source: Path, tmp_path: Path) -> None:
    copy, log = tmp_path / "mixed", tmp_path / "log"
    shutil.copytree(source, copy)
    Image.new("RGB", (20, 16)).save(copy / "b" / "9999.png")
    with pytest.raises(UsageError, match=r"b/9999.png has 20x16 pixels, but resize: none takes pictures of 16x16"):
        prepare(copy, tmp_path, encoder=ToyEncoder(log=str(log)))
    assert not log.exists()
    prepare(copy, tmp_path, resize="centre")


def test_shards_that_cannot_be_unpacked_where_they_lie(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(source, tmp_path)
    (folder / "train.arrow").unlink()

    def fails(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(table, "write_arrow", fails)
    with pytest.raises(UsageError, match=r"train.arrow is missing and cannot be made from .*Permission denied"):
        prepared.open_split(folder, "train")


def test_damaged_reference_pictures_are_found_by_verify(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path)
    arrow = folder / "reference.arrow"
    whole = bytearray(arrow.read_bytes())
    place = whole.index(b"IDAT") + 20
    whole[place] ^= 0xFF
    arrow.write_bytes(whole)
    with pytest.raises(UsageError, match=r"reference.arrow is damaged"):
        prepared.verify(folder)


def test_damage_is_named_with_what_to_do(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path, encoder=None)
    with pytest.raises(UsageError, match=r"unknown split 'trian' \(did you mean 'train'"):
        prepared.open_split(folder, "trian")
    arrow = folder / "train.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-9])
    with pytest.raises(UsageError, match=r"train.arrow is damaged .*; delete it: it is made again"):
        prepared.open_split(folder, "train")
    arrow.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    prepared.open_split(folder, "train")  # opening reads no picture
    with pytest.raises(UsageError, match=r"train.arrow is damaged \(the checksum of split train differs\)"):
        prepared.verify(folder)
    arrow.unlink()
    prepared.verify(folder)
    shutil.copy(folder / "validation.arrow", arrow)
    with pytest.raises(UsageError, match=r"train.arrow is damaged \(10 rows instead of 90\)"):
        prepared.open_split(folder, "train")
    (folder / "manifest.json").write_text('{"kind": "image"}')
    with pytest.raises(UsageError, match=r"manifest.json is damaged \(classes: is missing\)"):
        prepared.open_split(folder, "train")


def test_latents_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    class Broken(ToyEncoder):
        def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
            return super().__call__(pictures) * float("inf")

    with pytest.raises(UsageError, match="latents that are not finite"):
        prepare(source, tmp_path, encoder=Broken())

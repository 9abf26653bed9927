"""Prepared folders of pictures: whole or absent, continued after a kill, kept when the disk is full, made once."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toy_encoder import ToyEncoder

from raysparse import files
from raysparse.data import class_folders, image_build, prepared, shards, table
from raysparse.data.image import ImageOptions, Latents, Pictures
from raysparse.errors import UsageError

SIDE = 16
OPTIONS: dict[str, Any] = {"size_px": SIDE, "flips": True, "validation_examples": 10}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 pictures: 90 for training in three shards, 10 for validation."""
    return class_folders.draw_tiny(tmp_path_factory.mktemp("pictures"), ("a", "b"), 50, size_px=SIDE)


def prepare(source: Path, root: Path, **changes: Any) -> Path:
    encoder, run = changes.pop("encoder", ToyEncoder()), changes.pop("run", prepared.in_order)
    return prepared.prepare("imagefolder", OPTIONS | changes, source, root, encoder=encoder, run=run)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def pixels_of(source: Path, names: Sequence[str]) -> torch.Tensor:
    stack = np.stack([np.asarray(Image.open(source / name)).transpose(2, 0, 1) for name in names])
    return torch.from_numpy(stack)


def test_latents_are_those_of_the_pictures_and_of_the_mirrored_pictures(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path, conditional=True)
    train = prepared.open_split(folder, "train")
    assert isinstance(train, Latents)
    assert (len(train), train.value_shape, train.num_classes, train.flips) == (90, (3, 4, 4), 2, True)
    names = train.table.values("id")
    pictures = pixels_of(source, names)
    assert train.labels is not None
    assert [names[i][0] for i in range(90)] == ["ab"[label] for label in train.labels]
    flips = np.arange(90) % 3 == 0
    batch = train.batch(np.arange(90), flips)
    expected = ToyEncoder()(torch.where(torch.from_numpy(flips)[:, None, None, None], pictures.flip(-1), pictures))
    assert batch["x"].dtype == torch.float32
    assert torch.equal(batch["x"], expected.float())
    assert batch["cond"]["labels"].tolist() == train.labels.tolist()
    assert torch.equal(train.batch([3])["x"], ToyEncoder()(pictures[3:4]).float())
    reference = prepared.open_split(folder, "reference")
    assert isinstance(reference, Pictures)
    assert torch.equal(reference.images(range(90)), pictures)
    validation = prepared.open_split(folder, "validation")
    assert not validation.flips
    with pytest.raises(UsageError, match="mirrored pictures were not prepared"):
        validation.batch([0], [True])
    for split in (train, validation):
        with pytest.raises(UsageError, match="its pictures were not kept"):
            split.images([0])
    with pytest.raises(UsageError, match="give `first_stage`"):
        train.to_images(batch["x"], {})
    assert not set(names) & set(validation.table.values("id"))
    prepared.verify(folder)


def test_samples_are_decoded_by_what_setup_puts_in(source: Path, tmp_path: Path) -> None:
    train = prepared.open_split(prepare(source, tmp_path), "train")

    def decode(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(4, -1).repeat_interleave(4, -2).add(1).mul(127.5).clamp(0, 255).to(torch.uint8)

    images = dataclasses.replace(train, decode=decode).to_images(torch.zeros(2, *train.value_shape), {})
    assert images.shape == (2, 3, SIDE, SIDE)
    assert (images == 127).all()


def test_the_first_so_many(source: Path, tmp_path: Path) -> None:
    train = prepared.open_split(prepare(source, tmp_path, conditional=True), "train")
    few = train.first(7)
    assert train.labels is not None
    assert few.labels is not None
    assert (len(few), few.labels.tolist()) == (7, train.labels[:7].tolist())
    assert torch.equal(few.batch(range(7))["x"], train.batch(range(7))["x"])
    assert few.content_hash != train.content_hash
    assert train.first(90) is train
    with pytest.raises(IndexError, match="examples are 0 to 6, got 7 to 7"):
        few.batch([7])
    _, cond = few.draw_conditions(100, np.random.default_rng(0))
    assert set(cond["labels"].tolist()) == set(few.labels.tolist())


def test_pixels(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path, encoder=None, reference_examples=20)
    train, reference = prepared.open_split(folder, "train"), prepared.open_split(folder, "reference")
    assert [len(train), len(reference)] == [90, 20]
    assert train.labels is None
    assert reference.table.path == train.table.path  # the same pictures are not stored twice
    pictures = pixels_of(source, train.table.values("id"))
    assert torch.equal(train.images(range(90)), pictures)
    x = train.batch(range(90), np.arange(90) < 45)["x"]
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(train.to_images(x[45:], {}), pictures[45:])
    assert torch.equal(train.to_images(x[:45], {}), pictures[:45].flip(-1))
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0, -3.0])
    assert train.to_images(bad.reshape(1, 1, 1, 5).expand(1, 3, 1, 5), {})[0, 0, 0].tolist() == [128, 128, 128, 255, 0]
    with pytest.raises(IndexError, match="examples are 0 to 19"):
        reference.images([20])
    with pytest.raises(ValueError, match="one bool per example"):
        train.batch([0, 1], [True])
    shape, cond = train.draw_conditions(7, np.random.default_rng(0))
    assert (shape, cond) == ((7, 3, SIDE, SIDE), {})
    prepared.verify(folder)


def test_the_pictures_hash_is_of_the_pictures_alone(source: Path, tmp_path: Path) -> None:
    latents, pixels = prepare(source, tmp_path), prepare(source, tmp_path, encoder=None)
    hashes = [prepared.open_split(folder, "reference").images_hash for folder in (latents, pixels)]
    assert hashes[0] == hashes[1]
    content = [prepared.open_split(folder, "train").content_hash for folder in (latents, pixels)]
    assert content[0] != content[1]
    fewer = prepared.open_split(pixels, "reference").first(5)
    assert len(fewer) == 5
    assert fewer.images_hash != hashes[0]
    again = prepare(source, tmp_path / "again")
    assert manifest(again)["splits"] == manifest(latents)["splits"]


def test_another_encoder_is_another_data_set(source: Path, tmp_path: Path) -> None:
    folder, other = prepare(source, tmp_path), prepare(source, tmp_path, encoder=ToyEncoder("other"))
    assert folder != other
    prepared.check_encoder(folder, "toy")
    with pytest.raises(UsageError, match=r"latents made by encoder toy, but the settings ask for .* other"):
        prepared.check_encoder(folder, "other")
    with pytest.raises(UsageError, match="ask for pixels"):
        prepared.check_encoder(folder, None)
    with pytest.raises(UsageError, match="a first stage encodes pictures, but hershey holds sketches"):
        prepared.prepare("hershey", root=tmp_path, encoder=ToyEncoder())


def test_other_options_do_not_encode_again_what_is_encoded(tmp_path: Path) -> None:
    from raysparse.data.datasets import imagenet

    log, made = tmp_path / "log", tmp_path / "made"
    made.mkdir()
    tiny = imagenet.tiny_source(made)
    options: dict[str, Any] = {"size_px": SIDE, "classes": 2, "train_examples": 20, "validation_examples": 8}

    def folder(identity: str = "toy", **changes: Any) -> Path:
        log.write_text("")
        encoder = ToyEncoder(identity, log=str(log))
        made = prepared.prepare("imagenet", options | changes, tiny, tmp_path / "root", encoder=encoder)
        prepared.verify(made)
        return made

    first = folder()
    assert len(log.read_text().split()) == 28
    told = folder(conditional=True)
    assert log.read_text() == ""
    fewer = folder(reference_examples=5)
    assert log.read_text() == ""
    assert len({first, told, fewer}) == 3
    assert prepared.open_split(told, "train").labels is not None
    assert prepared.open_split(first, "train").labels is None
    assert len(prepared.open_split(fewer, "reference")) == 5
    shutil.rmtree(first)
    prepared.verify(told)
    for changes in ({"flips": True}, {"filter": "box"}, {"identity": "other"}):
        folder(**changes)
        assert len(log.read_text().split()) >= 20


def test_a_picture_is_encoded_once(source: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    encoder = ToyEncoder(log=str(log))
    prepare(source, tmp_path, encoder=encoder)
    assert len(log.read_text().split()) == 90 * 2 + 10
    prepare(source, tmp_path, encoder=encoder)
    assert len(log.read_text().split()) == 190


def test_examples_go_to_other_processes(source: Path, tmp_path: Path) -> None:
    train = prepared.open_split(prepare(source, tmp_path), "train")
    other = pickle.loads(pickle.dumps(train))
    assert torch.equal(other.batch([5])["x"], train.batch([5])["x"])


def test_progress_counts_pictures(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepared.prepare(
        "imagefolder", OPTIONS, source, tmp_path, lambda *counts: seen.append(counts), encoder=ToyEncoder()
    )
    assert seen[-1] == (190, 190)  # 90 + 10, and the reference as pictures
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def backwards(function: Callable[[Any], Any], tasks: Sequence[Any], /) -> Iterator[Any]:
    """A Run whose results come in another order, through pickles, as from other processes."""
    for task in reversed(tasks):
        yield pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(task)))))


def test_the_order_in_which_shards_finish_does_not_matter(source: Path, tmp_path: Path) -> None:
    first, second = prepare(source, tmp_path / "a"), prepare(source, tmp_path / "b", run=backwards)
    assert manifest(first) == manifest(second)


# Damaged pictures


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


# Kills, full disks, several at once


def _slow_prepare(source: str, root: str, log: str, seconds: float) -> None:
    encoder = ToyEncoder(seconds=seconds, log=log)
    prepare(Path(source), Path(root), encoder=encoder)


def _started(*arguments: Any) -> Any:
    worker = multiprocessing.get_context("spawn").Process(target=_slow_prepare, args=arguments)
    worker.start()
    return worker


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_prepare_goes_on_from_its_finished_shards(source: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    worker = _started(str(source), str(root), str(log), 0.02)

    def finished() -> list[Path]:
        return sorted(root.glob(".imagefolder-*.partial/share/train-*.parquet"))

    _wait_for(lambda: len(finished()) == 2)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    kept = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished()}
    assert len(kept) == 2
    litter = finished()[0].with_name(".train-00002-of-00003.parquet.x.tmp")
    litter.write_text("half a shard")  # what a kill in the middle of a write leaves
    log.unlink()
    folder = prepare(source, root, encoder=ToyEncoder(seconds=0.0, log=str(log)))
    assert len(log.read_text().split()) == 26 * 2 + 10  # the third shard of train, and validation
    now = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder / "share").iterdir()}
    assert all(now[path.name] == state for path, state in kept.items())
    assert sorted(path.name for path in root.iterdir()) == sorted([folder.name, "sources"])
    assert not list(folder.rglob("*.tmp"))
    prepared.verify(folder)
    assert manifest(folder) == manifest(prepare(source, tmp_path / "never killed"))


def _left_half_done(source: Path, root: Path) -> tuple[Path, list[Path]]:
    """The partial folder of a prepare that failed after its second shard."""

    def two(function: Callable[[Any], Any], tasks: Sequence[Any], /) -> Iterator[Any]:
        yield from map(function, tasks[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, root, run=two)
    (partial,) = root.glob(".imagefolder-*.partial")
    return partial, sorted((partial / "share").iterdir())


def test_finished_shards_are_checked_before_they_are_reused(source: Path, tmp_path: Path) -> None:
    expected = manifest(prepare(source, tmp_path / "whole"))
    for damage in (lambda whole: whole[:-7], lambda whole: whole[:300] + b"\xff" + whole[301:], lambda _: b""):
        _, (first, _second) = _left_half_done(source, tmp_path / "root")
        first.write_bytes(damage(first.read_bytes()))
        made: list[str] = []

        def run(function: Callable[[Any], Any], tasks: Sequence[Any], /, made: list[str] = made) -> Iterator[Any]:
            made.extend(task.path.name for task in tasks)
            return map(function, tasks)

        folder = prepare(source, tmp_path / "root", run=run)
        assert first.name in made
        assert len(made) == len(expected["files"]) - 1
        assert manifest(folder) == expected
        shutil.rmtree(tmp_path / "root")


def test_a_shard_of_another_source_is_not_reused(source: Path, tmp_path: Path) -> None:
    _, (first, second) = _left_half_done(source, tmp_path / "root")
    shutil.copy(second, first)
    assert manifest(prepare(source, tmp_path / "root")) == manifest(prepare(source, tmp_path / "whole"))


def test_a_full_disk_keeps_what_is_finished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = table.write_parquet, []

    def full(path: Path, *arguments: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            with files.atomic_path(path) as temporary:
                temporary.write_text("as much as fitted")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(table, "write_parquet", full)
    with pytest.raises(UsageError, match=r"is full \(No space left on device\)\. 2 of 7 shards are finished and kept"):
        prepare(source, tmp_path)
    (partial,) = tmp_path.glob(".imagefolder-*.partial")
    assert len(list((partial / "share").iterdir())) == 2
    folder = prepare(source, tmp_path)
    assert len(calls) == 3 + 5
    prepared.verify(folder)


def test_pyarrow_says_that_a_disk_is_full_by_its_number(tmp_path: Path) -> None:
    """What the message above depends on."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # a link: pyarrow removes what it could not write, which as root is the device itself
    big = pa.table({"x": np.random.default_rng(0).normal(size=1 << 17)})
    with pytest.raises(OSError, match="No space left") as caught:
        pq.write_table(big, full)
    assert caught.value.errno == errno.ENOSPC
    assert os.path.exists("/dev/full")


@pytest.mark.parametrize("failing", ["write_arrow", "write_parquet"])
def test_other_errors_of_the_disk_keep_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EDQUOT if failing == "write_arrow" else errno.EIO, "fails")

    with monkeypatch.context() as patched:
        patched.setattr(table, failing, fails)
        with pytest.raises(UsageError, match="is full" if failing == "write_arrow" else "cannot prepare 'imagefolder'"):
            prepare(source, tmp_path)
    prepared.verify(prepare(source, tmp_path))


def test_two_at_once_share_the_work(source: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    workers = [_started(str(source), str(root), str(log), 0.005) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.read_text().split()) == 190
    (folder,) = root.glob("imagefolder-*")
    prepared.verify(folder)
    assert sorted(path.name for path in root.iterdir()) == sorted([folder.name, "sources"])


def test_a_folder_without_manifest_is_replaced(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="not a prepared data set"):
        prepared.open_split(folder, "train")
    assert prepare(source, tmp_path) == folder
    prepared.verify(folder)


# What is shared, and damage of it


def test_manifest_and_shards_are_enough(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path)
    x = prepared.open_split(folder, "train").batch(range(90))["x"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(folder / "share", elsewhere / "share")
    shutil.copy(folder / "manifest.json", elsewhere)
    assert torch.equal(prepared.open_split(elsewhere, "train").batch(range(90))["x"], x)
    assert [path.name for path in elsewhere.glob("*.arrow")] == ["train.arrow"]
    prepared.verify(elsewhere)
    shared = pq.read_table(elsewhere / "share" / "train-00000-of-00003.parquet")
    assert shared.column_names == ["id", "label", "sha256", "latent", "latent_flipped"]
    (elsewhere / "train.arrow").unlink()
    shard = elsewhere / "share" / "train-00001-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"train-00001-of-00003.parquet is damaged \(\d+ bytes instead of \d+\)"):
        prepared.open_split(elsewhere, "train")
    shard.unlink()
    with pytest.raises(UsageError, match=r"train-00001-of-00003.parquet is missing; delete the folder"):
        prepared.open_split(elsewhere, "train")


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
    with pytest.raises(UsageError, match="not a data set's manifest"):
        prepared.open_split(folder, "train")


def test_latents_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    class Broken(ToyEncoder):
        def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
            return super().__call__(pictures) * float("inf")

    with pytest.raises(UsageError, match="latents that are not finite"):
        prepare(source, tmp_path, encoder=Broken())


def test_large_sets_have_a_bounded_number_of_shards(tmp_path: Path) -> None:
    entries = image_build.Entries(range(1_281_167), [""] * 1_281_167)
    common: dict[str, Any] = {
        "source_hash": "",
        "reader": None,
        "options": ImageOptions(),
        "content": "latents",
        "flips": True,
    }
    tasks = shards.plan(entries, tmp_path, "train", encoder=None, **common)
    assert len(tasks) == 256
    assert sum(len(task.entries) for task in tasks) == len(entries)
    assert [task.start for task in tasks] == list(range(0, len(entries), 5005))


@pytest.mark.slow
def test_12500_latents_open_unread_and_gather_fast(tmp_path: Path) -> None:
    """The paper's CelebA-HQ: opened in 50 ms without being read, a random epoch of batches of 12 in 1 s.

    Measured alone on 2 cores: 11 ms and .1 s; the limits here leave room for a busy machine."""
    rows = 500
    generator = np.random.default_rng(0)
    latents = {
        name: generator.normal(size=(rows, 3, 64, 64)).astype(np.float16) for name in ("latent", "latent_flipped")
    }
    columns = {
        "id": [str(i) for i in range(rows)],
        "label": np.full(rows, -1),
        "sha256": np.zeros((rows, 32), np.uint8),
    }
    table.write_parquet(tmp_path / "shard.parquet", columns | latents, {})
    table.write_arrow(tmp_path / "train.arrow", [tmp_path / "shard.parquet"] * 25)

    def examples() -> Latents:
        opened = table.Table(tmp_path / "train.arrow")
        return Latents(opened, len(opened), 256, None, 0, True, "", "")

    before = _resident_bytes()
    opening = min(_seconds(examples) for _ in range(5))
    assert opening < 0.05
    assert _resident_bytes() - before < 60e6  # of 615 MB
    data, order, flips = examples(), generator.permutation(12_500), generator.random(12_500) < 0.5

    def epoch() -> None:
        for start in range(0, 12_500, 12):
            data.batch(order[start : start + 12], flips[start : start + 12])

    assert min(_seconds(epoch) for _ in range(3)) < 1


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

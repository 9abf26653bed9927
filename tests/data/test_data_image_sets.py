"""The named sets of pictures: their layouts, splits and archives, and hostile files."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysparse import plugins
from raysparse.data import class_folders, prepared, sources, stores
from raysparse.data.datasets import celeba64, celeba_hq, cifar10, imagenette, lsun_bedrooms
from raysparse.data.listing import Listing
from raysparse.errors import UsageError

SMALL = {"train_examples": 16, "validation_examples": 4}


def find(name: str, source: Path | None, root: Path, **options: Any) -> Listing:
    checked = prepared.check_options(name, options)
    found: Listing = plugins.load("datasets", name).find(checked, source=source, root=root)
    return found


def names_only(folder: Path, names: list[str]) -> Path:
    """Empty files: a listing reads no picture."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# The papers' splits


def test_celeba_hq_has_the_papers_split(tmp_path: Path) -> None:
    source = names_only(tmp_path / "hq", [f"{i}.jpg" for i in range(30_000)])
    paper, full = find("celeba_hq", source, tmp_path), find("celeba_hq", source, tmp_path, split="full")
    assert (len(paper.train), len(paper.validation), len(paper.reference)) == (12_500, 500, 12_500)
    assert (len(full.train), len(full.validation)) == (25_000, 5_000)
    assert not set(full.train.ids) & set(full.validation.ids)
    options = celeba_hq.Options()
    assert (options.size_px, options.resize, options.flips) == (256, "centre", False)
    (source / "0.jpg").unlink()
    with pytest.raises(UsageError, match="has 29999 pictures, but the options ask for train_examples 25000 and"):
        find("celeba_hq", source, tmp_path, split="full")


def test_lsun_bedrooms_has_the_papers_split(tmp_path: Path) -> None:
    source = names_only(tmp_path / "lsun", [f"{i}.webp" for i in range(13_098)])
    found = find("lsun_bedrooms", source, tmp_path)
    assert (len(found.train), len(found.validation), len(found.reference)) == (10_598, 2_500, 10_598)
    options = lsun_bedrooms.Options()
    assert (options.size_px, options.resize, options.filter, options.flips) == (256, "centre", "bicubic", True)
    (source / "0.webp").unlink()
    with pytest.raises(UsageError, match="has 13097 pictures"):
        find("lsun_bedrooms", source, tmp_path)


def test_celeba64_splits_by_number(tmp_path: Path) -> None:
    source = names_only(tmp_path / "celeba", [f"{i:06d}.jpg" for i in (1, 2, 162_770, 162_771, 182_637, 182_638)])
    found = find("celeba64", source, tmp_path, train_examples=None, validation_examples=None)
    assert set(found.train.ids) == {"000001.jpg", "000002.jpg", "162770.jpg"}
    assert set(found.validation.ids) == {"162771.jpg", "182637.jpg"}
    with pytest.raises(
        UsageError, match="numbers 1 to 162770 has 3 pictures, but the options ask for train_examples 162"
    ):
        find("celeba64", source, tmp_path)
    (source / "face.jpg").touch()
    with pytest.raises(UsageError, match=r"face.jpg: its name is no number"):
        find("celeba64", source, tmp_path)
    assert celeba64.Options().resize == "celeba"


def test_imagenette_has_its_own_split_and_classes(tmp_path: Path) -> None:
    source = tmp_path / "imagenette2-320"
    for split, count in (("train", 9_469), ("val", 3_925)):
        names_only(source, [f"{split}/{imagenette.CLASSES[i % 10]}/{i}.JPEG" for i in range(count)])
    found = find("imagenette", tmp_path, tmp_path, conditional=True)  # the folder above is as good
    assert (len(found.train), len(found.validation), len(found.classes)) == (9_469, 3_925, 10)
    assert found.train.labels is not None
    assert [imagenette.CLASSES[label] for label in found.train.labels[:50]] == [
        name.split("/")[1] for name in found.train.ids[:50]
    ]
    shutil.rmtree(source / "train" / imagenette.CLASSES[3])
    with pytest.raises(UsageError, match=f"class folder .*{imagenette.CLASSES[3]} has no pictures"):
        find("imagenette", source, tmp_path)
    with pytest.raises(UsageError, match="has no folders train/ and val/"):
        find("imagenette", source / "train", tmp_path)


def test_imagenet_with_and_without_classes(tmp_path: Path) -> None:
    above = tmp_path / "above"
    source = above / "ILSVRC" / "Data" / "CLS-LOC"
    names_only(source, [f"train/n0000000{c}/{i}.JPEG" for c in range(3) for i in range(4)])
    names_only(source, [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(5)])
    small = {"train_examples": 12, "validation_examples": 5}
    assert len(find("imagenet", above, tmp_path, **small).classes) == 0
    with pytest.raises(UsageError, match="has 3 folders named by a WordNet id, not 1000"):
        find("imagenet", above, tmp_path, conditional=True, **small)
    with pytest.raises(UsageError, match=r"val_00000000.JPEG is in no class folder"):
        find("imagenet", above, tmp_path, conditional=True, classes=3, **small)
    with pytest.raises(UsageError, match="has 12 pictures, but the options ask for train_examples 1281167"):
        find("imagenet", above, tmp_path)


@pytest.mark.parametrize("name", ["celeba_hq", "celeba64", "lsun_bedrooms", "imagenet"])
def test_without_a_path_it_says_what_to_give(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --path with"):
        find(name, None, tmp_path)


# LSUN's stores


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders.draw_tiny(tmp_path_factory.mktemp("drawn"), (), 24, size_px=40)


def as_lmdb(drawn: Path, target: Path, bad: tuple[int, ...] = ()) -> Path:
    with lmdb.open(str(target), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i, path in enumerate(sorted(drawn.iterdir())):
            transaction.put(f"{i:03d}".encode(), b"bad" if i in bad else path.read_bytes())
    return target


def as_parquet(drawn: Path, target: Path) -> Path:
    target.mkdir()
    rows = [{"label": 0, "image": {"path": path.name, "bytes": path.read_bytes()}} for path in sorted(drawn.iterdir())]
    for number, part in enumerate((rows[:11], rows[11:])):
        pq.write_table(pa.Table.from_pylist(part), target / f"train-{number:05d}-of-00002.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(rows[:1]), target / "test-00000-of-00001.parquet")
    return target


def test_an_lmdb_a_folder_and_parquet_give_the_same_pictures(drawn: Path, tmp_path: Path) -> None:
    above = tmp_path / "lsun"
    above.mkdir()
    as_lmdb(drawn, above / "bedroom_train_lmdb")
    every = {"size_px": 32, "train_examples": 20, "validation_examples": 4}
    sets = {}
    for kind, source in (("lmdb", above), ("parquet", as_parquet(drawn, tmp_path / "parquet")), ("folder", drawn)):
        folder = prepared.prepare("lsun_bedrooms", every, source, tmp_path / "root")
        splits = [prepared.open_split(folder, split) for split in ("validation", "train")]
        sets[kind] = torch.cat([split.images(range(len(split))) for split in splits])
        prepared.verify(folder)
    assert torch.equal(sets["lmdb"], sets["parquet"])
    assert {picture.numpy().tobytes() for picture in sets["lmdb"]} == {p.numpy().tobytes() for p in sets["folder"]}
    single = find("lsun_bedrooms", tmp_path / "parquet" / "train-00000-of-00002.parquet", tmp_path, **SMALL | {
        "train_examples": 7})  # fmt: skip
    assert single.train.ids[-1] == "train-00000-of-00002.parquet, row 10"


def test_damage_in_an_lmdb_and_what_is_none(drawn: Path, tmp_path: Path) -> None:
    source = as_lmdb(drawn, tmp_path / "bedroom_train_lmdb", bad=(3,))
    folder = prepared.prepare("lsun_bedrooms", {"size_px": 32, **SMALL}, source, tmp_path / "root")
    assert prepared.damaged(folder) == [("003", "not a PNG, JPEG, WebP or BMP picture")]
    assert len(prepared.open_split(folder, "validation")) == 3
    with pytest.raises(UsageError, match="the lmdb has 24 pictures, but"):
        find("lsun_bedrooms", source, tmp_path)
    (source / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(UsageError, match="not a readable lmdb"):
        find("lsun_bedrooms", source, tmp_path, **SMALL)


def test_lmdb_is_an_extra(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_lmdb(drawn, tmp_path / "bedroom_train_lmdb")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UsageError, match=r"pip install 'raysparse\[lsun\]'"):
        find("lsun_bedrooms", source, tmp_path, **SMALL)


def test_parquet_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"x": list(range(30))}), tmp_path / "p" / "train.parquet")
    with pytest.raises(UsageError, match="no column of encoded pictures, only x"):
        prepared.prepare("lsun_bedrooms", {"size_px": 32, **SMALL}, tmp_path / "p", tmp_path / "root")
    (tmp_path / "p" / "train.parquet").write_text("text")
    with pytest.raises(UsageError, match="not readable Parquet"):
        find("lsun_bedrooms", tmp_path / "p", tmp_path, **SMALL)


# CIFAR-10's pickles


def test_cifar10_pictures_and_labels_are_those_of_the_batches(tmp_path: Path) -> None:
    source = cifar10.tiny_source(tmp_path)
    options = {"train_examples": 50, "validation_examples": 10, "conditional": True}
    folder = prepared.prepare("cifar10", options, source, tmp_path / "root")
    train = prepared.open_split(folder, "train")
    assert (len(train), train.num_classes, train.value_shape) == (50, 10, (3, 32, 32))
    assert train.labels is not None
    for row, name in enumerate(train.table.values("id")):
        batch, _, number = name.partition(", row ")
        raw = pickle.loads((source / batch).read_bytes())
        assert np.array_equal(train.images([row])[0].numpy(), raw["data"][int(number)].reshape(3, 32, 32))
        assert train.labels[row] == raw["labels"][int(number)]
    with pytest.raises(UsageError, match="has 50 pictures, but the options ask for train_examples 50000"):
        find("cifar10", source, tmp_path)


# protocol 2 as Python 2 wrote the real batches: str keys, numpy.core.multiarray, bytes as text
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(K\x06K\te"
    b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01bq\n\x87q\x0bRq\x0c"
    b"(K\x01K\x02M\x00\x0c\x86q\rcnumpy\ndtype\nq\x0eU\x02u1q\x0fK\x00K\x01\x87q\x10Rq\x11(K\x03U\x01|q\x12NNN"
    b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x13b\x89T\x00\x18\x00\x00" + bytes(range(256)) * 24 + b"q\x14tq\x15bu."
)


def test_a_batch_as_python_2_wrote_it(tmp_path: Path) -> None:
    for name in (*cifar10.TRAIN_BATCHES, cifar10.TEST_BATCH):
        (tmp_path / name).write_bytes(PYTHON_2)
    found = find("cifar10", tmp_path, tmp_path / "root", train_examples=10, validation_examples=2)
    (picture,) = found.reader.read([("data_batch_1", 1)])
    assert isinstance(picture, np.ndarray)
    assert picture.transpose(2, 0, 1).ravel().tolist() == list(range(256)) * 12
    assert found.train.labels is not None
    assert sorted(found.train.labels.tolist()) == [6] * 5 + [9] * 5


def batch(**changes: Any) -> dict[str, Any]:
    return {"labels": [1, 2], "data": np.zeros((2, 3072), np.uint8)} | changes


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(batch(data=Evil()), protocol=2), r"the pickle names (posix|nt)\.system.*nothing in it was run"),
        (pickle.dumps(batch(labels=Evil())), r"the pickle names (posix|nt)\.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "the pickle names builtins.eval"),
        (pickle.dumps(batch(data=np.zeros((2, 3072), np.float32))), r"data must be uint8 \[N, 3072\], got float32"),
        (pickle.dumps(batch(data=np.zeros((2, 3000), np.uint8))), r"got uint8 \[2, 3000\]"),
        (pickle.dumps(batch(labels=[1])), "labels must be 2 whole numbers"),
        (pickle.dumps(batch(labels=[1, "x"])), "labels must be 2 whole numbers"),
        (pickle.dumps(batch(labels=[1, 10])), r"its class id 10 is out of range; there are 10 classes, 0 to 9"),
        (pickle.dumps({"labels": []}), "not a CIFAR-10 batch"),
        (pickle.dumps([1, 2]), "not a CIFAR-10 batch"),
        (pickle.dumps(batch())[:-100], "damaged, not a whole pickle"),
        (b"", "damaged, not a whole pickle"),
    ],
)
def test_hostile_and_damaged_batches(content: bytes, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (*cifar10.TRAIN_BATCHES, cifar10.TEST_BATCH):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        find("cifar10", tmp_path, tmp_path / "root", train_examples=10, validation_examples=2)
    assert not (tmp_path / "owned").exists()


def test_cifar10_from_its_archive_and_from_folders(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    source = cifar10.tiny_source(tmp_path / "cifar-10-batches-py")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as writer:
        writer.add(source, "cifar-10-batches-py")
    options = {"train_examples": 50, "validation_examples": 10}
    folders = [prepared.prepare("cifar10", options, path, tmp_path / "root") for path in (source, archive, tmp_path)]
    assert folders[0] == folders[1] == folders[2]
    for split in ("train", "test"):
        class_folders.draw_tiny(tmp_path / "folders" / split, cifar10.CLASSES, 1, size_px=32)
    found = find("cifar10", tmp_path / "folders", tmp_path, train_examples=10, validation_examples=10)
    assert found.classes == cifar10.CLASSES
    with pytest.raises(UsageError, match="has neither test_batch nor train/ and test/"):
        find("cifar10", tmp_path / "root", tmp_path)


# Archives


def archive_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as writer:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return path


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tgz", ("x/one.png", b"1"), ("x/y/two.png", b"2"))
    folder = stores.unpacked(archive, tmp_path)
    assert (folder / "x/y/two.png").read_bytes() == b"2"
    (folder / "mark").touch()
    assert stores.unpacked(archive, tmp_path) == folder
    assert (folder / "mark").exists()
    assert folder.parent == tmp_path / "sources"


@pytest.mark.parametrize("name", ["../out.png", "/tmp/out.png", "x/../../out.png"])
def test_names_that_lead_out_of_an_archive(name: str, tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", ("fine.png", b""), (name, b"owned"))
    with pytest.raises(UsageError, match="leads out of the folder; not unpacked"):
        stores.unpacked(archive, tmp_path / "root")
    assert not (tmp_path / "out.png").exists()
    assert not list((tmp_path / "root" / "sources").glob("a-*"))


def test_links_in_an_archive_are_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as writer:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        writer.addfile(info)
        info = tarfile.TarInfo("link/passwd")
        info.size = 4
        writer.addfile(info, io.BytesIO(b"mine"))
    folder = stores.unpacked(archive, tmp_path)
    assert not (folder / "link").is_symlink()
    assert (folder / "link" / "passwd").read_bytes() == b"mine"


def test_damaged_and_empty_archives(tmp_path: Path) -> None:
    whole = archive_of(tmp_path / "whole.tgz", ("a.png", os.urandom(100_000))).read_bytes()
    for name, data in (("cut.tgz", whole[:50_000]), ("text.tgz", b"text"), ("none.tgz", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=f"{name}: damaged, not a readable archive"):
            stores.unpacked(tmp_path / name, tmp_path)
    with pytest.raises(UsageError, match="holds no files"):
        stores.unpacked(archive_of(tmp_path / "empty.tgz"), tmp_path)
    assert not [path for path in (tmp_path / "sources").iterdir() if path.name.startswith(("cut-", "text-", "none-"))]


def test_imagenette_from_its_archive(tmp_path: Path) -> None:
    plain = tmp_path / "imagenette2-160"
    plain.mkdir()
    imagenette.tiny_source(plain)
    with tarfile.open(tmp_path / "imagenette2-160.tgz", "w:gz") as writer:
        writer.add(plain, "imagenette2-160")
    options = {"size_px": 32, "train_examples": 16, "validation_examples": 8, "conditional": True}
    folder = prepared.prepare("imagenette", options, tmp_path / "imagenette2-160.tgz", tmp_path / "root")
    assert prepared.open_split(folder, "train").num_classes == 10


def test_pinned_checksums_are_those_of_torchvision() -> None:
    """Where an MD5 is pinned it is what the field's own loader pins."""
    from torchvision.datasets import CIFAR10, Imagenette

    theirs = {url.rpartition("/")[2]: md5 for url, md5 in Imagenette._ARCHIVES.values()}
    assert {file.name: file.md5 for file in imagenette.SPEC.downloads} == theirs
    assert cifar10.SPEC.downloads[0].md5 == CIFAR10.tgz_md5


def test_a_file_with_another_md5_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    asked: list[str] = []

    def fetch(url: str, path: Path, progress: Any) -> None:
        asked.append(url)
        path.write_bytes(b"something else")

    monkeypatch.setattr(sources, "_fetch", fetch)
    with pytest.raises(UsageError, match=r"its md5 is [0-9a-f]{32}, not c58f30108f718f92721af3b95e74349a"):
        find("cifar10", None, tmp_path)
    assert asked == [cifar10.SPEC.downloads[0].url]

"""LSUN Bedrooms: from its lmdb, from a folder of pictures, or from Parquet files."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from raysparse.data import class_folders, listing, prepared, sources
from raysparse.data.image import ImageOptions, Resize
from raysparse.data.listing import Entries, Listing
from raysparse.data.sketch import Spec
from raysparse.data.stores import Lmdb, Parquet
from raysparse.errors import UsageError

SPEC = Spec(
    name="lsun_bedrooms",
    title="LSUN Bedrooms",
    licence="research only; the pictures belong to their owners",
    citation="F. Yu et al., LSUN: Construction of a Large-Scale Image Dataset, arXiv:1506.03365",
    source="the folder bedroom_train_lmdb (or one that holds it), a folder of pictures, or of .parquet files",
    splits={
        "train": "10,598 pictures; of a folder by a fixed shuffle of sorted names, of an lmdb or Parquet those after "
        "validation (an lmdb is sorted by keys that are hashes: a fair sample without a walk over 3 million)",
        "validation": "2,500 others, the first of an lmdb or Parquet; which ones the paper took is unknown",
        "reference": "the training pictures, or the first `reference_examples` of them",
    },
    kind="image",
)


class Options(ImageOptions):
    resize: Resize = "centre"  # PAPER: centre crop, 256, flip p = .5
    flips: bool = True
    train_examples: int | None = Field(10_598, ge=1)
    validation_examples: int | None = Field(2_500, ge=1)


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The pictures, whatever they lie in. UsageError for fewer than asked for."""
    if source is None:
        raise UsageError(f"lsun_bedrooms is 43 GB and is not downloaded here; give --path with {SPEC.source}")
    if options.conditional:
        raise UsageError("lsun_bedrooms has no classes; set conditional: false")
    if not source.exists():
        raise UsageError(f"{source} does not exist; lsun_bedrooms expects {SPEC.source}")
    for lmdb in (source, source / "bedroom_train_lmdb"):
        if (lmdb / "data.mdb").is_file() or (lmdb.is_file() and lmdb.suffix == ".mdb"):
            store = Lmdb(lmdb)
            wanted = _wanted(options, store.total())
            entries = store.first(wanted)
            return _first(store, entries, options, store.content_hash(entries.keys, root), "lmdb")
    paths = _parquet(source)
    if paths:
        files = Parquet(paths)
        entries = files.entries(_wanted(options, files.total()))
        used = paths[: entries.keys[-1][0] + 1] if len(entries) else paths
        return _first(files, entries, options, sources.content_hash(used, root), "Parquet", str(source))
    return class_folders.whole(source, options, root, SPEC.source, progress)


def _parquet(source: Path) -> tuple[Path, ...]:
    """Parquet files in their order; of a data set with splits the training files."""
    found = [source] if source.is_file() and source.suffix == ".parquet" else sorted(source.rglob("*.parquet"))
    return tuple([path for path in found if path.name.startswith("train")] or found)


def _wanted(options: Options, total: int) -> int:
    """How many pictures to take of a store; an option that is None takes what the other leaves."""
    if options.train_examples is None or options.validation_examples is None:
        return total
    return options.train_examples + options.validation_examples


def _first(
    store: Lmdb | Parquet, entries: Entries, options: Options, source_hash: str, kind: str, where: str = "the lmdb"
) -> Listing:
    """The first pictures for validation, which so does not depend on train_examples, and the next ones for training."""
    n = len(entries)
    held_out = options.validation_examples or min(listing.VALIDATION_LIMIT, max(1, n // 10))
    train = options.train_examples or n - held_out
    if train < 1 or train + held_out > n:
        raise listing.too_few(n, where, train_examples=max(train, 1), validation_examples=held_out)
    return listing.complete(
        store,
        entries.part(held_out, held_out + train),
        entries.part(0, held_out),
        options,
        source_hash=source_hash,
        facts={"kind": kind},
    )


def tiny_source(folder: Path) -> Path:
    """Write a few made-up pictures as Parquet; returns the source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = sorted(class_folders.draw_tiny(folder / "drawn", (), 24, size_px=280).glob("*.png"))
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in pictures]
    (folder / "parquet").mkdir()
    for number, start in enumerate(range(0, len(rows), 10)):
        name = f"train-{number:05d}-of-00003.parquet"
        pq.write_table(pa.Table.from_pylist(rows[start : start + 10]), folder / "parquet" / name, row_group_size=4)
    return folder / "parquet"

"""Prepared folders of pictures: shards as Parquet to share, one memory-mapped Arrow file per split, manifest last.

    <root>/<name>-<hash>/share/<split>-00000-of-000NN.parquet  <split>.arrow  manifest.json
    <root>/.<name>-<hash>.partial/                             the same in the making

The hash covers options, content of the source, the encoder's identity and RECIPE. Who builds holds a lock on the
partial folder, which the system frees when the process dies; the next one goes on from the finished shards. If only
manifest and share/ were handed on, the Arrow files are made again when they are opened.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from raysparse import files
from raysparse.data import shards, table
from raysparse.data.image import Encoder, ImageOptions, Latents, Pictures
from raysparse.data.listing import Entries, Listing
from raysparse.data.shards import Run, Shard, Task
from raysparse.data.sketch import Spec
from raysparse.data.table import Table
from raysparse.errors import UsageError

RECIPE = 1  # raise it whenever the same source and options would give other arrays
SPLITS = ("train", "validation", "reference")

Progress = Callable[[int, int], None]  # (done, total), in pictures


def build(
    spec: Spec,
    options: ImageOptions,
    found: Listing,
    *,
    root: Path,
    encoder: Encoder | None,
    run: Run,
    progress: Progress | None = None,
) -> Path:
    """The folder of this data set with these options from this source, made now unless it is there.

    UsageError where no picture of a split can be read, and where the disk is full (what is finished is kept).
    """
    identity = _identity(spec, options, found, encoder)
    folder = root / f"{spec.name}-{identity[:16]}"
    if (folder / "manifest.json").is_file():
        return folder
    with _partial(root, folder) as partial:
        if (folder / "manifest.json").is_file():  # made by another process while this one waited
            return folder
        tasks = _plan(found, options, encoder, identity, partial / "share")
        try:
            done = _work(tasks, run, progress)
            manifest = _assemble(spec, options, found, encoder, done, partial)
            files.write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(_full(partial, tasks, error)) from error
        _publish(partial, folder)
    return folder


def _identity(spec: Spec, options: ImageOptions, found: Listing, encoder: Encoder | None) -> str:
    """Of all that decides what the folder holds. The labels' and splits' part of it does not follow from the files."""
    whole = hashlib.sha256(f"{RECIPE}\n{spec.name}\n{options.model_dump_json()}\n{found.source_hash}\n".encode())
    whole.update(f"{encoder.identity if encoder else None}\n{json.dumps(found.classes)}\n".encode())
    for split in SPLITS:
        entries: Entries = getattr(found, split)
        whole.update("\n".join([split, *entries.ids]).encode())
        if entries.labels is not None:
            whole.update(entries.labels.astype(np.int64).tobytes())
    return whole.hexdigest()


def _is_view(found: Listing) -> bool:
    """Whether the reference are the first training pictures."""
    return list(found.train.keys[: len(found.reference)]) == list(found.reference.keys)


def _plan(
    found: Listing, options: ImageOptions, encoder: Encoder | None, identity: str, share: Path
) -> dict[str, list[Task]]:
    """Tasks by split. The reference of a pixel set that is a part of train is not stored twice."""
    plans = {}
    for split in SPLITS:
        if split == "reference" and encoder is None and _is_view(found):
            continue
        # A raw picture is read at every step; a reference is read once, and as PNG takes half the space.
        content = "pixels" if encoder is None else "png" if split == "reference" else "latents"
        plans[split] = shards.plan(
            getattr(found, split),
            share,
            split,
            identity=identity,
            reader=found.reader,
            options=options,
            content=content,
            flips=options.flips and split == "train",
            encoder=encoder if content == "latents" else None,
        )
    return plans


def _work(plans: Mapping[str, Sequence[Task]], run: Run, progress: Progress | None) -> list[Shard]:
    """Every shard, those that a killed prepare finished first."""
    tasks = [task for plan in plans.values() for task in plan]
    total = sum(len(task.entries) for task in tasks)
    sizes = {(task.split, task.start): len(task.entries) for task in tasks}
    done, left = [], []
    for task in tasks:
        shard = shards.finished(task)
        done.append(shard) if shard else left.append(task)
    counted = sum(sizes[shard.split, shard.start] for shard in done)
    if progress and counted:
        progress(counted, total)
    for task in left:
        shards.check_sizes(task.reader, task.entries, task.options)
    for shard in run(shards.make, left):
        done.append(shard)
        counted += sizes[shard.split, shard.start]
        if progress:
            progress(counted, total)
    order = {split: i for i, split in enumerate(SPLITS)}
    return sorted(done, key=lambda shard: (order[shard.split], shard.start))


def _assemble(
    spec: Spec, options: ImageOptions, found: Listing, encoder: Encoder | None, done: Sequence[Shard], partial: Path
) -> dict[str, Any]:
    """The manifest, once the Arrow files are written and every split has pictures."""
    damaged = {shard_split: [d for s in done if s.split == shard_split for d in s.damaged] for shard_split in SPLITS}
    rows = {split: sum(shard.rows for shard in done if shard.split == split) for split in SPLITS}
    view = not any(shard.split == "reference" for shard in done)
    if view:
        rows["reference"] = len(found.reference) - sum(d[0] < len(found.reference) for d in damaged["train"])
    named = {name: reason for split in SPLITS for _, name, reason in damaged[split]}
    empty = [split for split in SPLITS if not rows[split]]
    if empty:
        shutil.rmtree(partial / "share", ignore_errors=True)
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(named.items())[:3])
        raise UsageError(
            f"data set {spec.name!r}: no picture of {', '.join(empty)} can be read, {len(named)} are damaged "
            f"({examples}). Expected: {spec.source}"
        )
    splits: dict[str, Any] = {}
    for split in SPLITS:
        names = [shard.name for shard in done if shard.split == split]
        if names:
            table.write_arrow(partial / f"{split}.arrow", [partial / "share" / name for name in names])
        kept = "train" if split == "reference" and view else split
        opened = Table(partial / f"{kept}.arrow")
        splits[split] = {
            "table": kept,
            "rows": rows[split],
            "shards": names,
            **_hashes(opened, rows[split], options.size_px),
        }
    return {
        "recipe": RECIPE,
        "kind": "image",
        "spec": dataclasses.asdict(spec) | {"splits": dict(spec.splits)},
        "options": json.loads(options.model_dump_json()),
        "size_px": options.size_px,
        "source_sha256": found.source_hash,
        "facts": dict(found.facts),
        "classes": list(found.classes),
        "encoder": encoder.identity if encoder else None,
        "latent_shape": list(encoder.latent_shape(options.size_px)) if encoder else None,
        "examples": sum(rows[split] for split in SPLITS if splits[split]["table"] == split),
        "damaged": [{"id": name, "reason": reason} for name, reason in named.items()],
        "splits": splits,
        "files": {shard.name: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in done},
    }


def _hashes(opened: Table, rows: int, size_px: int) -> dict[str, str]:
    """Of the content, whatever files and shards it lies in.

    images: of the pictures' pixels in their order; content: of what a batch gives, x and labels.
    """
    images = hashlib.sha256(f"{size_px}\n".encode())
    images.update(opened.gather("sha256", range(rows)).tobytes())
    content = hashlib.sha256(images.digest())
    for column in ("latent", "latent_flipped"):
        if column in opened.columns:
            for block in opened.blocks(column):
                content.update(block.tobytes())
    content.update(opened.numbers("label")[:rows].tobytes())
    return {"sha256": content.hexdigest(), "images_sha256": images.hexdigest()}


def open_split(folder: Path, manifest: Mapping[str, Any], split: str) -> Pictures | Latents:
    """One split. Nothing but labels is read. UsageError where a file is missing or not whole."""
    place = manifest["splits"][split]
    opened = _opened(folder, manifest, place["table"])
    options = manifest["options"]
    common: dict[str, Any] = {
        "table": opened,
        "count": place["rows"],
        "size_px": manifest["size_px"],
        "labels": opened.numbers("label")[: place["rows"]] if options["conditional"] else None,
        "num_classes": len(manifest["classes"]) if options["conditional"] else 0,
        "flips": options["flips"] and split == "train",
        "content_hash": place["sha256"],
        "images_hash": place["images_sha256"],
    }
    return Latents(**common) if "latent" in opened.columns else Pictures(**common)


def _opened(folder: Path, manifest: Mapping[str, Any], name: str) -> Table:
    path, place = folder / f"{name}.arrow", manifest["splits"][name]
    try:
        if not path.is_file():
            _made_again(folder, manifest, name)
        opened = Table(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing ({error}); {_again(folder)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({error}); delete it: it is made again from {folder / 'share'}") from error
    if len(opened) != place["rows"]:
        raise UsageError(
            f"{path} is damaged ({len(opened)} rows instead of {place['rows']}); delete it: it is made again from "
            f"{folder / 'share'}"
        )
    return opened


def _made_again(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """The Arrow file of a split from its shards; once, when several processes open the folder together."""
    with _locked(folder):
        if (folder / f"{name}.arrow").is_file():
            return
        paths = [folder / "share" / shard for shard in manifest["splits"][name]["shards"]]
        for path in paths:
            _check_file(path, manifest["files"][path.name], folder, whole=False)
        table.write_arrow(folder / f"{name}.arrow", paths)


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Read every byte. UsageError naming the file that is not what was written."""
    for name, facts in manifest["files"].items():
        _check_file(folder / "share" / name, facts, folder, whole=True)
    for split, place in manifest["splits"].items():
        opened = _opened(folder, manifest, place["table"])
        hashes = _hashes(opened, place["rows"], manifest["size_px"])
        if hashes != {name: place[name] for name in hashes} or not _pixels_hold(opened):
            raise UsageError(
                f"{opened.path} is damaged (the checksum of split {split} differs); delete it: it is made again"
            )


def _pixels_hold(opened: Table) -> bool:
    if "pixels" not in opened.columns:
        return True
    pairs = zip(opened.blocks("pixels"), opened.blocks("sha256"), strict=True)
    return all(
        hashlib.sha256(picture.tobytes()).digest() == digest.tobytes()
        for pictures, digests in pairs
        for picture, digest in zip(pictures, digests, strict=True)
    )


def _check_file(path: Path, facts: Mapping[str, Any], folder: Path, *, whole: bool) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; {_again(folder)}") from error
    if size != facts["bytes"]:
        raise UsageError(f"{path} is damaged ({size} bytes instead of {facts['bytes']}); {_again(folder)}")
    if whole and files.sha256(path) != facts["sha256"]:
        raise UsageError(f"{path} is damaged (its checksum differs); {_again(folder)}")


def check_encoder(folder: Path, manifest: Mapping[str, Any], identity: str | None) -> None:
    """UsageError where the folder's latents are another encoder's than `identity` (None: pixels are wanted)."""
    found = manifest.get("encoder")
    if found == identity:
        return
    got = f"latents made by encoder {found}" if found else "pixels"
    wanted = f"latents of encoder {identity}" if identity else "pixels (no first_stage)"
    raise UsageError(
        f"{folder} holds {got}, but the settings ask for {wanted}; run `raysparse prepare` with the first_stage that "
        "the trial names"
    )


def _again(folder: Path) -> str:
    return f"delete the folder {folder} and run `raysparse prepare` again"


def _full(partial: Path, plans: Mapping[str, Sequence[Task]], error: OSError) -> str:
    tasks = [task for plan in plans.values() for task in plan]
    kept = [task.path for task in tasks if task.path.is_file()]
    size = sum(path.stat().st_size for path in kept)
    return (
        f"the disk of {partial.parent} is full ({error.strerror}). {len(kept)} of {len(tasks)} shards are finished and "
        f"kept ({size / 1e6:.0f} MB in {partial}); make room and give the same command, which goes on from them"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock on a folder, free again when its holder's process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _partial(root: Path, folder: Path) -> Iterator[Path]:
    """The folder in which this process alone builds; it stays when the block fails, unless nothing is in it."""
    partial = root / f".{folder.name}.partial"
    while True:
        (partial / "share").mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not _same(handle, partial):  # renamed or removed while this process waited for the lock
                continue
            try:
                yield partial
            finally:
                _remove_if_empty(partial)
            return
        finally:
            os.close(handle)


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_empty(partial: Path) -> None:
    for place in (partial / "share", partial):
        _remove_unfinished(place)
        try:
            place.rmdir()
        except OSError:
            return


def _remove_unfinished(place: Path) -> None:
    for left in place.glob(".*.tmp"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)


def _publish(partial: Path, folder: Path) -> None:
    _remove_unfinished(partial / "share")
    _remove_unfinished(partial)
    if folder.exists():
        shutil.rmtree(folder)  # a folder without a manifest was not made by us: damaged
    partial.rename(folder)

"""How a folder of pictures is prepared: shards by tasks, an Arrow file per split from them, manifest last, rename.

    <root>/.<name>-<hash>.partial/share/...    in the making; renamed to <root>/<name>-<hash>

The hash covers options, content of the source, encoder's identity and recipe's version: a folder is never out of date.
Who builds holds a lock on the partial folder, which the system frees when the process dies; the next one goes on
from the finished shards. A shard that another folder has already, because only the classes or another reference are
asked for, is linked and not made again.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysparse import files
from raysparse.data import shards, table
from raysparse.data.image import Encoder, ImageOptions
from raysparse.data.image_folder import hashes
from raysparse.data.listing import Entries, Listing
from raysparse.data.manifest import SPLITS
from raysparse.data.partial import building, publish
from raysparse.data.shards import Run, Shard, Task
from raysparse.data.sketch import Spec
from raysparse.data.table import Table
from raysparse.errors import UsageError

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
    with building(folder) as partial:
        if (folder / "manifest.json").is_file():  # made by another process while this one waited
            return folder
        (partial / "share").mkdir(exist_ok=True)
        tasks = _plan(found, options, encoder, partial / "share")
        for task in (task for plan in tasks.values() for task in plan):
            shards.adopt(task, sorted(root.glob(f"{spec.name}-*/share/{task.path.name}")))
        try:
            done = _work(tasks, run, progress)
            manifest = _assemble(spec, options, found, encoder, done, partial)
            files.write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(_full(partial, tasks, error)) from error
        publish(partial, folder)
    return folder


def _identity(spec: Spec, options: ImageOptions, found: Listing, encoder: Encoder | None) -> str:
    """Of all that decides what the folder holds. The labels' and splits' part of it does not follow from the files."""
    whole = hashlib.sha256(f"{shards.RECIPE}\n{spec.name}\n{options.model_dump_json()}\n{found.source_hash}\n".encode())
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


def _plan(found: Listing, options: ImageOptions, encoder: Encoder | None, share: Path) -> dict[str, list[Task]]:
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
            source_hash=found.source_hash,
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
            **hashes(opened, rows[split], options.size_px),
        }
    return {
        "recipe": shards.RECIPE,
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


def _full(partial: Path, plans: Mapping[str, Sequence[Task]], error: OSError) -> str:
    tasks = [task for plan in plans.values() for task in plan]
    kept = [task.path for task in tasks if task.path.is_file()]
    size = sum(path.stat().st_size for path in kept)
    return (
        f"the disk of {partial.parent} is full ({error.strerror}). {len(kept)} of {len(tasks)} shards are finished and "
        f"kept ({size / 1e6:.0f} MB in {partial}); make room and give the same command, which goes on from them"
    )

"""Prepared data sets on disk: arrays that every trial maps into memory, and a manifest that comes last.

    <root>/<name>-<hash>/points.npy offsets.npy labels.npy manifest.json    sketches; pictures: see image_folder.py

The hash covers the options, the content of the source and RECIPE, so a folder is never out of date and never changed.
It is built beside its place and renamed, so it is whole or absent: two preparing at once make the same folder twice
and the first one stays, and what a killed one leaves is removed by the next.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from raysparse import files, plugins
from raysparse.data import image_build, image_folder
from raysparse.data import manifest as manifests
from raysparse.data.image import Encoder, ImageOptions
from raysparse.data.manifest import SPLITS as SPLITS
from raysparse.data.manifest import is_image
from raysparse.data.shards import Run as Run
from raysparse.data.shards import in_order as in_order
from raysparse.data.sketch import Examples, Spec
from raysparse.errors import UsageError, unknown, usage_error_from

RECIPE = 1  # raise it whenever the same source and options would give other arrays
ARRAYS = ("points", "offsets", "labels")
_STALE_S = 60  # a build folder this old that nobody holds is left from a killed process

Progress = Callable[[int, int], None]  # (done, total), in sketches, pictures or bytes


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a data set's recipe makes.

    points: float32 [P, 3]; lengths: int64 [N]; labels: int64 [N] or None; classes: names, in the labels' order
    splits: name -> range of examples; ranges may overlap (a reference split of training examples costs nothing)
    facts: what the manifest keeps of how it came about
    """

    points: NDArray[np.float32]
    lengths: NDArray[np.int64]
    splits: Mapping[str, range]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def default_root() -> Path:
    """Where prepared data sets lie: $RAYSPARSE_DATA, or raysparse/data in the user's cache folder."""
    return files.cache_folder("RAYSPARSE_DATA", "data")


def prepare(
    name: str,
    options: Mapping[str, Any] | BaseModel | None = None,
    source: Path | str | None = None,
    root: Path | str | None = None,
    progress: Progress | None = None,
    *,
    encoder: Encoder | None = None,
    run: Run = in_order,
) -> Path:
    """The folder of a prepared data set, made now unless it is there. UsageError for an unknown set or option, and for
    a source that is missing or damaged.

    source: the raw file or folder; None: the embedded data, or the download. root: None is default_root().
    encoder: makes latents of pictures; None: they are kept as pixels. run: how the shards of pictures are worked off.
    """
    module = plugins.load("datasets", name)
    checked = options if isinstance(options, BaseModel) else check_options(name, options or {})
    place = Path(root).expanduser() if root else default_root()
    raw = Path(source).expanduser() if source else None
    if encoder is not None and module.SPEC.kind != "image":
        raise UsageError(f"a first stage encodes pictures, but {name} holds sketches; leave out first_stage")
    try:
        if isinstance(checked, ImageOptions):
            found = module.find(checked, source=raw, root=place, progress=progress)
            return image_build.build(
                module.SPEC, checked, found, root=place, encoder=encoder, run=run, progress=progress
            )
        folder: Path = module.prepare(checked, source=raw, root=place, progress=progress)
    except OSError as error:
        raise UsageError(f"cannot prepare {name!r} in {place}: {error}; check permissions and free space") from error
    except MemoryError as error:
        raise UsageError(f"cannot prepare {name!r}: not enough memory ({str(error) or 'none left'})") from error
    return folder


def check_options(name: str, options: Mapping[str, Any]) -> BaseModel:
    """A data set's Options, checked. UsageError naming the key, with the nearest valid one."""
    model: type[BaseModel] = plugins.load("datasets", name).Options
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise usage_error_from(error, f"options of data set {name!r}", model) from error


def open_split(folder: Path, split: str) -> Any:
    """One split of a prepared data set: sketch.Examples, image.Pictures or image.Latents.

    Checks that the files are whole by their sizes; `verify` reads every byte.
    """
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise UsageError(f"{folder}: {unknown('split', split, manifest['splits'])}")
    opener = image_folder.open_split if is_image(manifest) else _open_sketches
    return opener(folder, manifest, split)


def damaged(folder: Path) -> list[tuple[str, str]]:
    """(id, reason) of each picture of the source that could not be read and is in no split."""
    return [(found["id"], found["reason"]) for found in read_manifest(folder).get("damaged", [])]


def check_encoder(folder: Path, identity: str | None) -> None:
    """UsageError where the folder's latents are another encoder's than `identity`; None: pixels are wanted."""
    image_folder.check_encoder(folder, read_manifest(folder), identity)


def _open_sketches(folder: Path, manifest: dict[str, Any], split: str) -> Examples:
    arrays = {name: _map_array(folder, name, facts) for name, facts in manifest["arrays"].items()}
    place, classes, held = manifest["splits"][split], len(manifest["classes"]), len(arrays["offsets"]) - 1
    labels = arrays.get("labels")
    if place["stop"] > held:
        raise manifests.damaged(folder, f"splits.{split}.stop is {place['stop']}, the arrays hold {held} examples")
    if labels is not None and labels.max() >= classes:
        raise manifests.damaged(folder, f"{classes} classes, but the labels go to {labels.max()}")
    return Examples(
        points=arrays["points"],
        offsets=arrays["offsets"][place["start"] : place["stop"] + 1],
        labels=None if labels is None else np.array(labels[place["start"] : place["stop"]]),
        num_classes=classes,
        representation=manifest["options"]["representation"],
        content_hash=place["sha256"],
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. UsageError where there is none, or it says what cannot be."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        wrong = manifests.complaint(manifest)
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is not a prepared data set (no manifest.json); run `raysparse prepare`") from error
    except (ValueError, OSError, RecursionError) as error:
        raise manifests.damaged(folder, error) from error
    if wrong:
        raise manifests.damaged(folder, wrong)
    return manifest


def verify(folder: Path) -> None:
    """Read every byte of a prepared data set. UsageError naming the array that is not what was written."""
    manifest = read_manifest(folder)
    if is_image(manifest):
        return image_folder.verify(folder, manifest)
    for name, facts in manifest["arrays"].items():
        _map_array(folder, name, facts)
        if files.sha256(folder / f"{name}.npy") != facts["sha256"]:
            raise UsageError(f"{folder / name}.npy is damaged (its checksum differs); {manifests.again(folder)}")


def build(spec: Spec, options: BaseModel, *, source_hash: str, root: Path, make: Callable[[], Contents]) -> Path:
    """The folder of this data set with these options from this source; `make` is called where it is not there yet."""
    text = options.model_dump_json()
    identity = f"{RECIPE}\n{spec.name}\n{text}\n{source_hash}"
    folder = root / f"{spec.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if (folder / "manifest.json").is_file():
        return folder
    with _build_folder(root, folder.name) as temporary:
        contents = make()
        _check(contents, spec)
        manifest = {
            "recipe": RECIPE,
            "spec": dataclasses.asdict(spec) | {"splits": dict(spec.splits)},
            "options": json.loads(text),
            "source_sha256": source_hash,
            "facts": dict(contents.facts),
            "classes": list(contents.classes),
            "examples": len(contents.lengths),
            "mean_points": float(contents.lengths.mean()),
        }
        manifest |= _write_arrays(temporary, contents)
        files.write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        _publish(temporary, folder)
    return folder


def _check(contents: Contents, spec: Spec) -> None:
    empty = [name for name in SPLITS if not len(contents.splits[name])]
    if empty:
        raise UsageError(
            f"data set {spec.name!r}: no examples in {', '.join(empty)}. Only {len(contents.lengths)} sketches can be "
            "used, those with a stroke of two points, some extent and fewer points than point_limit. "
            f"Expected: {spec.source}"
        )


def _write_arrays(folder: Path, contents: Contents) -> dict[str, Any]:
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(contents.lengths, dtype=np.int64)])
    arrays: dict[str, NDArray[Any]] = {"points": contents.points.astype(np.float32, copy=False), "offsets": offsets}
    if contents.labels is not None:
        arrays["labels"] = contents.labels.astype(np.int64, copy=False)
    facts = {}
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        with path.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        facts[name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    splits = {}
    for name, examples in contents.splits.items():
        digest = hashlib.sha256()
        first, last = offsets[examples.start], offsets[examples.stop]
        digest.update((offsets[examples.start : examples.stop + 1] - first).tobytes())
        digest.update(arrays["points"][first:last].tobytes())
        if "labels" in arrays:
            digest.update(arrays["labels"][examples.start : examples.stop].tobytes())
        splits[name] = {"start": examples.start, "stop": examples.stop, "sha256": digest.hexdigest()}
    return {"arrays": facts, "splits": splits}


def _map_array(folder: Path, name: str, facts: Mapping[str, Any]) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise UsageError(f"{path} is damaged ({size} bytes instead of {facts['bytes']}); {manifests.again(folder)}")
        # offsets are small and indexed at every batch: in memory they cost no page faults
        mapped: NDArray[Any] = np.load(path, mmap_mode="r" if name == "points" else None, allow_pickle=False)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; {manifests.again(folder)}") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); {manifests.again(folder)}") from error
    return mapped


@contextmanager
def _build_folder(root: Path, name: str) -> Iterator[Path]:
    """A folder beside the place, locked while this process builds in it, gone afterwards unless renamed."""
    root.mkdir(parents=True, exist_ok=True)
    _remove_stale(root)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=root))
    temporary.chmod(0o755)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(root: Path) -> None:
    for left in root.glob(".*.tmp"):
        try:
            if not left.is_dir() or time.time() - left.stat().st_mtime < _STALE_S:
                continue
            handle = os.open(left, os.O_RDONLY)
        except OSError:
            continue  # another process was faster
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # somebody is building in it
        finally:
            os.close(handle)


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place. Another process that was faster has the same arrays: its folder stays."""
    for _ in range(3):
        try:
            temporary.rename(folder)
        except OSError:
            if (folder / "manifest.json").is_file():
                return
            shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest was not made by us: damaged
        else:
            return
    raise UsageError(f"cannot make {folder}; delete it or check its permissions")

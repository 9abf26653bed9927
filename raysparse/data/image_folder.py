"""Prepared folders of pictures: shards as Parquet to share, one memory-mapped Arrow file per split, manifest last.

    <root>/<name>-<hash>/share/<split>-00000-of-000NN.parquet  <split>.arrow  manifest.json

If only the manifest and share/ were handed on, the Arrow files are made again when they are opened. image_build.py
makes these folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysparse import files
from raysparse.data import decoding, table
from raysparse.data import manifest as manifests
from raysparse.data.image import Latents, Pictures
from raysparse.data.partial import locked
from raysparse.data.table import Table
from raysparse.errors import UsageError


def open_split(folder: Path, manifest: Mapping[str, Any], split: str) -> Pictures | Latents:
    """One split. Nothing but labels is read. UsageError where a file is missing or not whole."""
    place = manifest["splits"][split]
    opened = _opened(folder, manifest, place["table"])
    options, classes = manifest["options"], len(manifest["classes"])
    labels = opened.numbers("label")[: place["rows"]] if options["conditional"] else None
    if labels is not None and labels.max() >= classes:
        raise manifests.damaged(folder, f"{classes} classes, but the labels go to {labels.max()}")
    common: dict[str, Any] = {
        "table": opened,
        "count": place["rows"],
        "size_px": manifest["size_px"],
        "labels": labels,
        "num_classes": classes if options["conditional"] else 0,
        "flips": options["flips"] and split == "train",
        "content_hash": place["sha256"],
        "images_hash": place["images_sha256"],
    }
    return Latents(**common) if "latent" in opened.columns else Pictures(**common)


def _opened(folder: Path, manifest: Mapping[str, Any], name: str) -> Table:
    path, place = folder / f"{name}.arrow", manifest["splits"][name]
    if not path.is_file():
        try:
            _made_again(folder, manifest, name)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"{path} is missing and cannot be made from {folder / 'share'} ({error}); give this user the right to "
                f"write there, make room, or {manifests.again(folder)}"
            ) from error
    try:
        opened = Table(path)
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
    with locked(folder):
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
        found = hashes(opened, place["rows"], manifest["size_px"])
        if found != {name: place[name] for name in found} or not _holds(opened):
            raise UsageError(
                f"{opened.path} is damaged (the checksum of split {split} differs); delete it: it is made again"
            )


def _pictures_hold(opened: Table) -> bool:
    """Whether each picture is the one of its checksum."""
    if "latent" in opened.columns:
        return True  # its pictures were not kept; the latents are part of the content's hash
    for row, digest in enumerate(opened.gather("sha256", range(len(opened)))):
        if "png" in opened.columns:
            picture = decoding.pixels(decoding.decode(opened.blob("png", row)))
        else:
            picture = opened.gather("pixels", [row])[0]
        if hashlib.sha256(picture.tobytes()).digest() != digest.tobytes():
            return False
    return True


def _holds(opened: Table) -> bool:
    try:
        return _pictures_hold(opened)
    except decoding.Damaged:
        return False


def _check_file(path: Path, facts: Mapping[str, Any], folder: Path, *, whole: bool) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; {manifests.again(folder)}") from error
    if size != facts["bytes"]:
        raise UsageError(f"{path} is damaged ({size} bytes instead of {facts['bytes']}); {manifests.again(folder)}")
    if whole and files.sha256(path) != facts["sha256"]:
        raise UsageError(f"{path} is damaged (its checksum differs); {manifests.again(folder)}")


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


def hashes(opened: Table, rows: int, size_px: int) -> dict[str, str]:
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

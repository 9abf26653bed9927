"""KanjiVG characters as stroke sequences, from the .npz files of hardmaru/sketch-rnn-datasets.

After preprocessing at spacing .05 the training sketches have 88.6 points on average, 99 % at most 129, all at most 165
(PAPER: ChiroDiff, data).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raysparse import files
from raysparse.data import pickles, prepared, sources, synthetic
from raysparse.data.preprocess import Strokes, are_coordinates, concatenate, normalise
from raysparse.data.sketch import Download, SketchOptions, Spec
from raysparse.errors import UsageError

_PLACE = "https://github.com/hardmaru/sketch-rnn-datasets/raw/master/kanji/"

SPEC = Spec(
    name="kanjivg",
    title="KanjiVG: 11,458 Japanese characters in strokes",
    licence="CC BY-SA 3.0, copyright Ulrich Apel",
    citation="U. Apel, KanjiVG; sequences by D. Ha (hardmaru/sketch-rnn-datasets)",
    source="an .npz with object arrays train, valid, test of [n, 3] rows (dx, dy, pen lifted), or its folder",
    splits={
        "train": "the file's train",
        "validation": "the file's valid and test: real sketches that no model has seen",
        "reference": "option `reference`; the file's train unless said otherwise: FID against the training set",
    },
    mean_points=88.6,  # measured; Table 2 of the sparse paper implies 88.9
    downloads=(
        Download(
            "kanji.rdp100.npz",
            _PLACE + "kanji.rdp100.npz",
            "d625d310f3132ab3b7fa9bb574d8c8201e18a51d92fdcd4b4f783b5a7730d58a",
        ),
        Download(
            "short_kanji.npz",
            _PLACE + "short_kanji.npz",
            "f6855ba03d58f44830499dd98e7cb99f46c970651f4f16f2d886398f34709914",
        ),
    ),
)


class Options(SketchOptions):
    # Which file to download. kanji.rdp100 is the one whose preprocessed lengths match the paper's FLOPs.
    file: Literal["kanji.rdp100.npz", "short_kanji.npz"] = "kanji.rdp100.npz"
    # What FID compares with. "test" is the file's valid and test (1,100 sketches), which is then also the validation
    # split; "all" is the whole file.
    reference: Literal["train", "test", "all"] = "train"


def prepare(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Path:
    """Prepared folder. source: the .npz or the folder it lies in; None: download `options.file`.

    A file with a known name must have its known checksum; one of another name is taken as the user's own data.
    """
    known = {file.name: file for file in SPEC.downloads}[options.file]
    if source is None:
        assert known.sha256 is not None
        return prepared.build(
            SPEC,
            options,
            source_hash=known.sha256,
            root=root,
            make=lambda: _make(sources.downloaded(known, root, progress), options),
        )
    path = source / options.file if source.is_dir() else source
    digest = _checked(path)
    return prepared.build(SPEC, options, source_hash=digest, root=root, make=lambda: _make(path, options))


def _checked(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path} does not exist; kanjivg expects {SPEC.source}")
    digest = files.sha256(path)
    pinned = {file.name: file.sha256 for file in SPEC.downloads}.get(path.name, digest)
    if digest != pinned:
        raise UsageError(
            f"{path} is damaged or another version: its sha256 is {digest}, not {pinned}. Get it again "
            "(`raysparse prepare kanjivg` without --path), or rename it if it is your own data"
        )
    return digest


def _make(path: Path, options: Options) -> prepared.Contents:
    arrays = pickles.load_npz(path)
    lacking = [name for name in ("train", "valid", "test") if name not in arrays]
    if lacking:
        raise UsageError(f"{path}: has no array {', '.join(lacking)}; it must be {SPEC.source}")
    parts, edges = [], [0]
    for name in ("train", "valid", "test"):
        raw = Strokes.of([strokes(rows, f"{path}, {name}[{i}]") for i, rows in enumerate(arrays[name])])
        parts.append(normalise(raw, spacing=options.spacing, point_limit=options.point_limit))
        edges.append(edges[-1] + len(parts[-1].lengths))
    whole = concatenate(parts)
    unseen = range(edges[1], edges[3])
    splits = {
        "train": range(0, edges[1]),
        "validation": unseen,
        "reference": {"train": range(0, edges[1]), "test": unseen, "all": range(0, edges[3])}[options.reference],
    }
    return prepared.Contents(whole.points, whole.lengths, splits, facts={"file": path.name})


def strokes(rows: NDArray[Any], where: str) -> list[NDArray[np.float64]]:
    """Stroke-3 rows [n, 3] (dx, dy, pen lifted after this point) as strokes of absolute points [n, 2].

    The origin before the first row is no point of the sketch. UsageError naming `where` for other or infinite values.
    """
    if rows.ndim != 2 or rows.shape[1] != 3 or not are_coordinates(rows):
        raise UsageError(f"{where}: must be finite numbers [n, 3] (dx, dy, pen lifted), got {rows.dtype} {rows.shape}")
    points = np.cumsum(rows[:, :2], axis=0, dtype=np.float64)
    return np.split(points, np.flatnonzero(rows[:-1, 2] > 0) + 1)


def tiny_source(folder: Path) -> Path:
    """Write a few made-up drawings in this format; returns the source."""
    arrays: dict[str, Any] = {}
    for seed, (name, count) in enumerate((("train", 40), ("valid", 6), ("test", 5))):
        arrays[name] = np.empty(count, object)
        for i, drawing in enumerate(synthetic.doodles(count, seed)):
            points = np.concatenate(drawing)
            lifted = np.concatenate([np.arange(len(stroke)) == len(stroke) - 1 for stroke in drawing])
            arrays[name][i] = np.column_stack([np.diff(points, axis=0, prepend=0), lifted])
    np.savez_compressed(folder / "tiny.npz", **arrays)
    return folder / "tiny.npz"

"""Quick, Draw!: doodles by category, from Google's raw .ndjson files (one JSON per line).

The sparse paper trains one model per category (cat, crab, mosquito) and averages: one trial each with
`categories: [cat]`. Several categories at once make one model of all of them; with `conditional: true` it is told the
class (the paper's conditional run: + bus, flower, yoga, fish).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from raysparse.data import prepared, shuffled, sources, synthetic
from raysparse.data.preprocess import Drawing, are_coordinates
from raysparse.data.sketch import Download, Spec
from raysparse.errors import UsageError

PAPER_CATEGORIES = ("cat", "crab", "mosquito")
CONDITIONAL_CATEGORIES = (*PAPER_CATEGORIES, "bus", "flower", "yoga", "fish")
_BUCKET = "https://storage.googleapis.com/quickdraw_dataset/full/raw/"


def _download(category: str) -> Download:
    # Google publishes no checksums; the manifest records what came.
    return Download(f"{category}.ndjson", _BUCKET + category.replace(" ", "%20") + ".ndjson", None)


SPEC = Spec(
    name="quickdraw",
    title="Quick, Draw!: doodles by category, raw",
    licence="CC BY 4.0, Google",
    citation="D. Ha and D. Eck, A Neural Representation of Sketch Drawings, ICLR 2018",
    source="a folder of raw (not simplified) <category>.ndjson files, a JSON per line with 'drawing': [[x], [y], [t]]",
    splits=shuffled.SPLITS,
    mean_points=88.2,  # what the test FLOPs of the paper's Table 2 imply
    downloads=tuple(_download(category) for category in CONDITIONAL_CATEGORIES),
)


class Options(shuffled.ShuffledOptions):
    # None: the paper's three, or its seven with `conditional`.
    categories: tuple[str, ...] | None = Field(None, min_length=1)
    per_category: int | None = Field(None, ge=1)  # only the first so many drawings of each file; None: all
    recognized_only: bool = False  # leave out what Quick, Draw! did not recognise; the original keeps it

    @field_validator("categories")
    @classmethod
    def _each_once(cls, categories: tuple[str, ...] | None) -> tuple[str, ...] | None:
        # Twice, each drawing would be there twice, in training and in validation.
        twice = sorted({name for name in categories or () if (categories or ()).count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is there more than once; name each category once")
        return categories

    @property
    def chosen(self) -> tuple[str, ...]:
        """The categories, in the order of the labels."""
        return self.categories or (CONDITIONAL_CATEGORIES if self.conditional else PAPER_CATEGORIES)


def prepare(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Path:
    """Prepared folder. source: the folder of .ndjson files; None: download them (some 600 MB per category)."""
    if source is None:
        paths = [sources.downloaded(_download(category), root, progress) for category in options.chosen]
    else:
        paths = [_existing(source, category) for category in options.chosen]
    return prepared.build(
        SPEC,
        options,
        source_hash=sources.content_hash(paths, root),
        root=root,
        make=lambda: _make(paths, options, progress),
    )


def _existing(source: Path, category: str) -> Path:
    path = source / f"{category}.ndjson"
    if not path.is_file():
        there = sorted(found.stem for found in source.glob("*.ndjson")) if source.is_dir() else []
        raise UsageError(
            f"{path} does not exist (there: {', '.join(there) or 'no .ndjson file'}); quickdraw expects {SPEC.source}. "
            "Option `categories` chooses"
        )
    return path


def _make(paths: list[Path], options: Options, progress: prepared.Progress | None) -> prepared.Contents:
    total = sum(path.stat().st_size for path in paths)

    def classes() -> Iterator[tuple[str, Iterator[Drawing]]]:
        done = 0
        for path in paths:
            yield path.stem, _drawings(path, options, _shifted(progress, done, total))
            done += path.stat().st_size

    return shuffled.contents(classes(), options, {"files": [path.name for path in paths]})


def _shifted(progress: prepared.Progress | None, before: int, total: int) -> Callable[[int], None]:
    """Reports the bytes of all files while one of them is read."""
    return lambda done: progress(before + done, total) if progress else None


def _drawings(path: Path, options: Options, report: Callable[[int], None]) -> Iterator[Drawing]:
    """The drawings of one file, a line at a time. UsageError naming file and line for a line that is none."""
    read = found = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if found == options.per_category:
                return
            read += len(line)
            if number % 2000 == 0:
                report(read)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if options.recognized_only and not record["recognized"]:
                    continue
                drawing = [_stroke(stroke) for stroke in record["drawing"]]
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise UsageError(
                    f"{path}:{number}: not a raw Quick, Draw! drawing ({reason}); get the file again"
                ) from error
            found += 1
            yield drawing


def _stroke(stroke: Any) -> NDArray[np.float64]:
    if len(stroke) != 3:
        raise ValueError(
            f"a stroke has {len(stroke)} lists, not x, y and t; simplified files lack t, take the raw ones"
        )
    points = np.array(stroke[:2], np.float64).T
    numbers = set(map(type, (*stroke[0], *stroke[1]))) <= {int, float}  # NumPy takes "12" and true as well
    if not numbers or points.ndim != 2 or len(points) != len(stroke[2]) or not are_coordinates(points):
        raise ValueError("a stroke's x, y and t must be lists of finite numbers of one length")
    return points


def tiny_source(folder: Path) -> Path:
    """Write a few made-up drawings per category in this format; returns the source."""
    for seed, category in enumerate(PAPER_CATEGORIES):
        lines = []
        for drawing in synthetic.doodles(20, seed):
            strokes = [[*stroke.T.round(2).tolist(), list(range(len(stroke)))] for stroke in drawing]
            lines.append(json.dumps({"word": category, "recognized": True, "drawing": strokes}) + "\n")
        (folder / f"{category}.ndjson").write_text("".join(lines), encoding="utf-8")
    return folder

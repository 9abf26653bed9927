"""The recipe shared by data sets that come without splits: shuffle once, hold some out, draw a reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raysparse import rng
from raysparse.data.prepared import Contents
from raysparse.data.preprocess import Drawing, Sequences, chunks, concatenate, normalise, reorder
from raysparse.data.sketch import SketchOptions

SPLITS = {
    "train": "all but the validation sketches",
    "validation": "`validation_examples` drawn at random (at most a tenth of all), seen by no model",
    "reference": "`reference_examples` of the training sketches, drawn at random",
}
_SEED = 0  # fixed: the splits are the same everywhere


class ShuffledOptions(SketchOptions):
    # FID compares with so many real sketches (PAPER: 10k samples against 20k real), all training ones if fewer.
    reference_examples: int = Field(20_000, ge=1)
    validation_examples: int = Field(2_500, ge=1)
    conditional: bool = False  # give the class to the model


def contents(
    classes: Iterable[tuple[str, Iterable[Drawing]]], options: ShuffledOptions, facts: dict[str, Any]
) -> Contents:
    """Prepared arrays of all classes, mixed. Each class is (its name, its drawings); labels follow this order."""
    names, parts, counts = [], [], []
    for name, drawings in classes:
        found = [normalise(raw, spacing=options.spacing, point_limit=options.point_limit) for raw in chunks(drawings)]
        names.append(name)
        parts.extend(found)
        counts.append(sum(len(part.lengths) for part in found))
    labels = np.repeat(np.arange(len(names)), counts)
    order = rng.numpy_generator(_SEED, "split").permutation(len(labels))
    whole = reorder(concatenate(parts), order)
    return _split(whole, labels[order], names, options, facts | dict(zip(names, counts, strict=True)))


def _split(
    whole: Sequences, labels: NDArray[np.int64], names: Sequence[str], options: ShuffledOptions, facts: dict[str, Any]
) -> Contents:
    """Training sketches first, those of the reference last among them, then the validation sketches."""
    n = len(whole.lengths)
    trained = n - min(options.validation_examples, max(1, n // 10), n)
    return Contents(
        whole.points,
        whole.lengths,
        {
            "train": range(trained),
            "validation": range(trained, n),
            "reference": range(max(0, trained - options.reference_examples), trained),
        },
        labels=labels if options.conditional else None,
        classes=tuple(names) if options.conditional else (),
        facts=facts,
    )

"""Sample grids from the same noise: dense beside the best sparse configuration."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import words
from analysis.load import samples_png
from analysis.markup import Html, join, tag
from analysis.sections import Section
from raysparse.errors import UsageError

PNG = b"\x89PNG\r\n\x1a\n"


def html(section: Section) -> Html:
    """A figure with one or two grids; nothing where no record has a grid."""
    dense, best = section.dense, section.best
    left, right = _pair(_grids(section, dense), _grids(section, best))
    shown = [("Dense", dense, left), ("Best sparse", best, right)]
    pictures = [
        _picture(name, row, seed, grid)
        for name, row, pair in shown
        if row is not None and pair
        for seed, grid in [pair]
    ]
    if not pictures:
        return join()
    if left and right:
        same = "Both start from the same noise." if left[0] == right[0] else "The seeds differ, so the noise does too."
    else:
        same = "The other side has no stored grid."
    caption = tag(
        "figcaption", f"Samples of the last report that kept any. {same} One grid is an impression, no measure."
    )
    return tag("figure", tag("div", *pictures, class_="grids"), caption)


def _grids(section: Section, row: dict[str, Any] | None) -> dict[int, bytes]:
    """seed -> PNG of the trials behind a row of `configurations`."""
    if row is None:
        return {}
    trials = section.trials
    same = trials["configuration"].eq(row["configuration"]) & trials["stage"].eq(row["stage"]) & trials["full_budget"]
    if not words.missing(row["trial_id"]):
        same &= trials["trial_id"].eq(row["trial_id"])
    return {int(trial["seed"]): grid for trial in _records(trials[same]) if (grid := _read(trial["path"]))}


def _records(trials: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in trials.to_dict("records")]


def _read(path: str) -> bytes | None:
    try:
        grid = samples_png(Path(path))
    except UsageError:  # rewritten or removed since it was read: the page can do without
        return None
    return grid if grid and grid.startswith(PNG) else None


def _pair(left: dict[int, bytes], right: dict[int, bytes]) -> tuple[tuple[int, bytes] | None, tuple[int, bytes] | None]:
    """The grids of the smallest seed that both have, else of each one's own smallest."""
    both = sorted(set(left) & set(right))
    if both:
        return (both[0], left[both[0]]), (both[0], right[both[0]])
    first, second = (min(grids) if grids else None for grids in (left, right))
    return (None if first is None else (first, left[first])), (None if second is None else (second, right[second]))


def _picture(name: str, row: dict[str, Any], seed: int, grid: bytes) -> Html:
    source = f"data:image/png;base64,{base64.b64encode(grid).decode()}"
    label = f"{name}: {words.configuration(row)}, seed {seed}"
    return tag("div", tag("img", src=source, alt=f"Grid of generated samples. {label}"), tag("p", label), class_="grid")

"""Numbers and configurations as a reader wants to see them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

NONE = "–"
_NUMBER = re.compile(r"(?<=[=\[ ])-?\d+\.\d{4,}(?:e[+-]?\d+)?(?=[,\]]|$)")  # of other settings, such as a drawn one


def missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value))


def number(value: Any, like: float | None = None) -> str:
    """A FID, KID or loss with the decimals that its size deserves; of a difference, no more than `like` gets."""
    if missing(value):
        return NONE
    decimals = _decimals(value) if like is None or missing(like) else min(_decimals(value), _decimals(like))
    return f"{value:,.{decimals}f}"


def spread(mean: Any, std: Any) -> str:
    """`12.30 ± 0.41`; the mean alone where there is no spread."""
    if missing(mean) or missing(std):
        return number(mean)
    # A spread that would round to nothing gets the decimals to show its first digit.
    decimals = max(_decimals(mean), min(8, -math.floor(math.log10(std))) if std > 0 else 0)
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"


def _decimals(value: Any) -> int:
    size = abs(value)
    if size == 0 or size >= 1:
        return 1 if size >= 100 else 2
    return int(min(8, 2 - math.floor(math.log10(size))))


def signed(value: Any, like: float | None = None) -> str:
    """A difference with its sign: `+0.50`, `−2.73`."""
    return NONE if missing(value) else ("+" if value >= 0 else "−") + number(abs(value), like=like)


def interval(row: Mapping[str, Any], name: str, like: float | None = None) -> str:
    """A difference with its interval from the columns `name`, `name_low`, `name_high`: `+0.50 (−2.73 to +3.73)`."""
    estimate, low, high = (signed(row[column], like) for column in (name, f"{name}_low", f"{name}_high"))
    return estimate if low == NONE else f"{estimate} ({low} to {high})"


def ratio(value: Any) -> str:
    return NONE if missing(value) else f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def percent(value: Any) -> str:
    return NONE if missing(value) else f"{100 * value:.{0 if value >= 0.02 else 1}f}\N{NO-BREAK SPACE}%"


def integer(value: Any) -> str:
    return NONE if missing(value) else f"{int(value):,}"


def plain_number(value: Any) -> str:
    """A setting: 0.9, 0.05, 1e-05; what a search drew is cut to four digits (the CSV has them all)."""
    return NONE if missing(value) else f"{value:.4g}"


def scientific(value: Any) -> str:
    """FLOPs: `1.92e13`."""
    if missing(value):
        return NONE
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: Any) -> str:
    if missing(seconds):
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"


def text(value: Any) -> str:
    return NONE if missing(value) or value == "" else str(value)


CONFIGURATION = ("method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings")  # what it reads


def configuration(row: Mapping[str, Any]) -> str:
    """`rigl, S = 0.9, p = 0.05, ΔTe = 800`, and what else varies in this sweep."""
    parts = [str(row["method"])]
    if row["sparsity"] or row["method"] != "dense":
        parts.append(f"S = {plain_number(row['sparsity'])}")
    if not missing(row["prune_ratio"]):
        parts.append(f"p = {plain_number(row['prune_ratio'])}")
    if not missing(row["update_interval_steps"]):
        parts.append(f"ΔTe = {int(row['update_interval_steps'])}")
    return ", ".join(parts + ([others(row["other_settings"])] if row["other_settings"] else []))


def others(text: Any) -> str:
    """Other settings, their numbers as `plain_number` has them: one drawn as .0031016900253760284 is 0.003102."""
    return NONE if missing(text) or text == "" else _NUMBER.sub(lambda found: plain_number(float(found[0])), str(text))


def shortened(text: str) -> str:
    """A label that leaves a figure its place: of more than 48 characters the first and the last."""
    return text if len(text) <= 48 else f"{text[:28]}…{text[-19:]}"


def seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def listed(items: list[str], most: int = 6) -> str:
    """`a, b and c`; `a, b and 7 more` where there are many."""
    if len(items) > most:
        items = [*items[: most - 1], f"{len(items) - most + 1} more"]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)

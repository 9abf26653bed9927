"""How much of a mask other seeds share, and how far it moved: from the sample of the masks in the records.

`mask_sample` (raysparse.results) holds the bits of some thousand positions, the same ones in every trial of a model.
The overlap of two masks is the share of active connections that they have in common, 2 |A and B| / (|A| + |B|); by
chance, layer by layer, it is the sum of n d_A d_B over the mean of n d: a layer that is kept dense overlaps by itself.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import marks, stats, style, words
from analysis.dynamics import best_of_each
from analysis.load import column
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import DENSE, Section
from analysis.tables import Column, Table
from raysparse.errors import UsageError

Mask = dict[str, np.ndarray]  # layer -> uint8 bits at the sampled positions


def parts(section: Section) -> list[Part]:
    """Overlap across seeds and with the first report's mask, of each method's best."""
    best = best_of_each(section)
    best = best[best["method"].ne(DENSE)]
    if best.empty:
        return []
    kept = {row["configuration"]: _trials(section, row) for row in marks.records_of(best)}
    if not any(masks for trials in kept.values() for masks in trials.values()):
        told = "Not shown: these records were written before masks were sampled."
        return [Part("masks", "Masks across seeds", sentences=(told,))]
    rows = overlaps(best, kept)
    found = []
    if len(rows):
        found.append(Part("masks", "Masks across seeds", tables=(table(section, rows),)))
    moved = drift(section, best, kept)
    if moved is not None:
        caption = (
            "Share of active connections that were active at a trial's first report too, one line per seed. A static "
            "topology stays at 100 %."
        )
        found.append(Part("mask_drift", "How far the topology moved from its first report", moved, caption))
    return found


def overlap(one: Mask, other: Mask) -> tuple[float, float]:
    """Share of active connections in common, and what chance would give; NaN where layers differ or none is active."""
    if set(one) != set(other) or any(len(one[name]) != len(other[name]) for name in one):
        return float("nan"), float("nan")
    active = (sum(int(bits.sum()) for bits in one.values()) + sum(int(bits.sum()) for bits in other.values())) / 2
    if not active:
        return float("nan"), float("nan")
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    # A layer's last byte is filled up with zeros: n is a few too large there and d as much too small.
    chance = sum(float(one[name].sum()) * float(other[name].sum()) / len(one[name]) for name in one)
    return both / active, chance / active


def overlaps(best: pd.DataFrame, kept: dict[str, dict[str, list[tuple[int, Mask]]]]) -> pd.DataFrame:
    """A row per configuration with two seeds: pairs, mean and standard deviation of the overlap over pairs, chance."""
    rows = []
    for row in marks.records_of(best):
        last = [masks[-1][1] for masks in kept[row["configuration"]].values() if masks]
        pairs = [overlap(a, b) for a, b in itertools.combinations(last, 2)]
        shared = stats.sample([share for share, _ in pairs])
        if pairs:
            facts = ("method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings", "configuration")
            rows.append({name: row[name] for name in facts} | {
                "seeds": len(last), "pairs": len(pairs), "overlap_mean": shared.mean, "overlap_std": shared.std,
                "chance": float(np.mean([chance for _, chance in pairs])),
            })  # fmt: skip
    return pd.DataFrame(rows)


def table(section: Section, rows: pd.DataFrame) -> Table:
    """The overlaps."""
    columns = (
        Column("configuration", words.configuration, numeric=False),
        Column("seeds", lambda row: words.integer(row["seeds"])),
        Column("overlap", lambda row: words.percent(row["overlap_mean"])),
        Column("by chance", lambda row: words.percent(row["chance"])),
    )
    caption = (
        "Share of active connections that two seeds have in common in their last report, mean over pairs of seeds, "
        "and what independent masks of the same densities would share. From a sample of some thousand positions: good "
        "to two or three percentage points at high S. Networks of different seeds may be the same up to the order of "
        "their units, which this does not see."
    )
    frame = rows.assign(model=section.model, dataset=section.dataset)
    return Table("masks", "Masks across seeds", caption, frame, columns)


def drift(section: Section, best: pd.DataFrame, kept: dict[str, dict[str, list[tuple[int, Mask]]]]) -> go.Figure | None:
    """Overlap with the mask of the first report over steps."""
    drawn = style.figure("optimizer step", "still active since the first report")
    looks = style.looks(section.methods())
    for row in marks.records_of(best):
        name = plain(words.configuration(row))
        x: list[float] = []
        y: list[float] = []
        for masks in kept[row["configuration"]].values():
            shares = [overlap(masks[0][1], mask)[0] for _, mask in masks]
            x += [*(float(step) for step, _ in masks), float("nan")]
            y += [*shares, float("nan")]
        if len(x) > 2:
            colour, symbol = looks[row["method"]]
            drawn.add_scatter(
                x=x[:-1], y=y[:-1], mode="lines+markers", name=name, line={"color": colour, "width": 2},
                marker={"symbol": symbol, "size": 5}, customdata=marks.keys(pd.DataFrame([row] * (len(x) - 1))),
                hovertemplate=f"<b>{name}</b><br>step %{{x:,}}: %{{y:.1%}}<extra></extra>",
            )  # fmt: skip
    if not drawn.data:
        return None
    drawn.update_xaxes(rangemode="tozero")
    return drawn.update_yaxes(tickformat=".0%", range=[-0.02, 1.04])


def read(path: str) -> list[tuple[int, Mask]]:
    """(step, mask) of a record's reports that have one; nothing where it cannot be read (any more)."""
    try:
        texts = zip(column(Path(path), "step"), column(Path(path), "mask_sample"), strict=True)
        return [(int(step), _parsed(text)) for step, text in texts if step is not None and text]
    except (UsageError, ValueError, AttributeError, TypeError):
        return []


def _parsed(text: str) -> Mask:
    layers = json.loads(text).items()
    return {str(name): np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8)) for name, bits in layers}


def _trials(section: Section, row: marks.Row) -> dict[str, list[tuple[int, Mask]]]:
    trials = section.trials[section.trials["configuration"].eq(row["configuration"]) & section.trials["full_budget"]]
    trials = trials[trials["stage"].eq(row["stage"])].drop_duplicates("seed", keep="last")
    return {str(trial): read(str(path)) for trial, path in zip(trials["trial_id"], trials["path"], strict=True)}

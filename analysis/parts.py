"""The parts of a section's page, in order: `parts(section)`. Each topic is a module that gives its parts.

A part is what a reader sees under one heading: words, a figure with its caption, pictures, tables. The page, the files
beside it and a notebook all take parts from here, so a new topic is one module and one line in `parts`.

Points of a figure that stand for configurations carry `customdata` rows `[method, S, p]` (p None where the method has
none), and frames of tables columns `method`, `sparsity`, `prune_ratio`: a page can filter by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from analysis import tables
from analysis.markup import Html
from analysis.sections import Section

NOTHING = Html("")


@dataclass(frozen=True)
class Part:
    """One heading of the page. Where everything but the title is empty there is nothing to show."""

    name: str  # [a-z0-9_]+, unique in a section: anchors and the files of its figure are named by it
    title: str
    figure: go.Figure | None = None
    caption: str = ""  # of the figure
    sentences: tuple[str, ...] = ()  # plain text above the figure, a paragraph each
    pictures: Html = NOTHING  # markup made by this package, between figure and tables
    tables: tuple[tables.Table, ...] = ()  # names are unique in a section: their files are named by them
    folded: bool = False  # tables that are long: shown when asked for


def parts(section: Section) -> Iterator[Part]:
    """All parts of a section in the order of the page, each when it is made; those with nothing to show left out."""
    from analysis import (
        absent,
        by_sparsity,
        dynamics,
        importance,
        improvement,
        layers,
        listing,
        masks,
        measured,
        pareto,
        prune_ratio,
        published_numbers,
        rungs,
        sampling_steps,
    )

    topics = (
        listing.summary,
        by_sparsity.over_sparsity,
        published_numbers.parts,
        by_sparsity.for_each_ratio,
        pareto.parts,
        improvement.parts,
        listing.main,
        listing.samples,
        prune_ratio.parts,
        sampling_steps.parts,
        dynamics.parts,
        measured.parts,
        listing.curves,
        layers.parts,
        masks.parts,
        importance.parts,
        rungs.parts,
        absent.parts,
        listing.trials,
    )
    return _shown(part for topic in topics for part in topic(section))


def overall(sections: Sequence[Section]) -> Iterator[Part]:
    """The parts above all sections, where there are several."""
    from analysis import overall as across

    return _shown(across.parts(sections))


def _shown(found: Iterable[Part]) -> Iterator[Part]:
    return (part for part in found if part.figure or part.sentences or part.pictures or part.tables)

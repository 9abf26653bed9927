"""The parts of a section's page, in order: `parts(section)`. Each topic is a module that gives its parts.

A part is what a reader sees under one heading: words, a figure with its caption, pictures, tables. The page, the files
beside it and a notebook all take parts from here, so a new topic is one module and one line in `parts`.

Points of a figure that stand for configurations carry `customdata` rows `[method, S, p]` (p None where the method has
none), and frames of tables columns `method`, `sparsity`, `prune_ratio`: a page can filter by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from analysis import tables, words
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


def parts(section: Section) -> list[Part]:
    """All parts in the order of the page, those with nothing to show left out."""
    found = _overview(section)
    return [part for part in found if part.figure or part.sentences or part.pictures or part.tables]


def _overview(section: Section) -> list[Part]:
    from analysis import figures, samples

    fid = section.fid_name
    hollow = "Filled: confirmed, mean ± standard deviation over seeds. Hollow: one seed, no claim."
    summary, main = tables.summary(section), tables.main(section)
    stopped, trials = tables.stopped(section), tables.trials(section)
    return [
        Part("summary", summary.title, tables=(summary,)),
        Part("sparsity", f"{fid} against sparsity", figures.fid_against_sparsity(section),
             f"{hollow} The line joins the best confirmed configuration of a method at each S; the band is dense."),
        Part("flops", f"{fid} against inference FLOPs", figures.fid_against_flops(section),
             f"{hollow} FLOPs are of all DDIM steps. No configuration beats one on the dotted front in both."),
        Part("main", main.title, tables=(main,)),
        Part("samples", "Samples", pictures=samples.html(section)),
        Part("curves", f"{fid} during training", figures.training_curves(section, "fid"),
             "A line per trial, confirmed ones stronger; a cross where a trial was stopped or failed."),
        Part("losses", "Validation loss during training", figures.training_curves(section, "validation_loss"),
             "Masked EMA weights on fixed noise and timesteps."),
        Part("timeline", "What was stopped, and when", figures.timeline(section), _saved(section)),
        Part("stopped", stopped.title, tables=(stopped,)),
        Part("trials", trials.title, tables=(trials,), folded=True),
    ]  # fmt: skip


def _saved(section: Section) -> str:
    stopped = tables.stopped_trials(section)
    searched = section.trials[section.trials["stage"].ne("confirm")]
    budget = int(searched["total_steps"].sum())
    if stopped.empty or not budget:
        return "A line per search trial, as long as it trained. No trial was stopped early."
    saved = int(stopped["steps_saved"].sum())
    return (
        f"A line per search trial, as long as it trained. {len(stopped)} of {len(searched)} were stopped early: "
        f"{saved:,} of {budget:,} steps ({words.percent(saved / budget)}) were not spent. A stopped trial's FID is no "
        "result."
    )

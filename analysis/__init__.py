"""What sparsity costs and saves, from a sweep's Parquet records: `python -m analysis RESULTS [RESULTS ...]`.

Reads records only (neither torch nor ray), so it runs wherever the results folder can be read, also on a running sweep.

    load.py       records -> one tidy row per report (`analysis.load(path)`), one row per trial, evaluations
    sections.py   the comparable parts (`analysis.sections_of(path)`); configurations with mean, spread and verdict
    stats.py      mean, spread, Welch interval, Pareto front; robust.py: what else a few seeds allow
    tables.py     a section's tables as CSV, Markdown and LaTeX (latex.py)
    figures.py    FID over S, curves, timeline (plotly); marks.py: what several figures draw; style.py: their one look
    parts.py      a part of the page: figure, words, tables; what follows is a topic each and gives its parts
      by_sparsity, pareto, improvement, prune_ratio, sampling_steps, published_numbers (published/), dynamics, measured,
      layers, masks, importance, rungs, listing, absent; overall.py: across sections
    headline.py   the first paragraph, in plain words
    report.py     the files: `report.write(results)`
    page.py       the page (web/: its template, style and scripts); table_html, stamp, payload: its tables, the protocol
                  and commands, the figures as data
    vector.py     the figures as SVG and PDF, by matplotlib (vector_traces.py); drawing.py: in two processes
    compare.py    two sweeps: `python -m analysis compare A B`

In a notebook:

    import analysis
    from analysis import figures, pareto

    frame = analysis.load("results/quickstart")  # a row per report; columns: analysis/load.py
    section = analysis.sections_of("results/quickstart")[0]
    figures.fid_against_sparsity(section).show()
    pareto.figure(section, pareto.COSTS[0]).show()
    section.confirmed[["method", "sparsity", "fid_mean", "fid_std", "verdict"]]
"""

from __future__ import annotations

from pathlib import Path

from analysis.load import load, read
from analysis.sections import Section, split

__all__ = ["Section", "load", "sections_of"]


def sections_of(*results: Path | str) -> list[Section]:
    """The comparable parts of one or several results folders, the one with most trials first; see sections.py.

    UsageError where a folder is no results folder or none holds a readable record. What could not be read is left out;
    `analysis.load.read` says what.
    """
    return split(read(*(Path(folder) for folder in results)))

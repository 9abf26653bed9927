"""What sparsity costs and saves, from a sweep's Parquet records: `python -m analysis RESULTS`.

Reads records only (neither torch nor ray), so it runs wherever the results folder can be read, also on a running sweep.

    load.py       records -> one tidy row per report (`analysis.load(path)`), one row per trial
    sections.py   the comparable parts; configurations with mean, spread and verdict
    stats.py      mean, spread, Welch interval, Pareto front
    tables.py     CSV, Markdown and HTML of a section's tables
    figures.py    a function per figure (plotly); style.py: their one look
    headline.py   the first paragraph, in plain words
    report.py     the page: `report.write(results)`
"""

from analysis.load import load

__all__ = ["load"]

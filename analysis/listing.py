"""The parts that every sweep has: the tables of configurations and trials, the sample grids, all curves."""

from __future__ import annotations

from analysis import figures, tables
from analysis import samples as grids
from analysis.parts import Part
from analysis.sections import Section


def summary(section: Section) -> list[Part]:
    """Dense and the best of each method."""
    table = tables.summary(section)
    return [Part("summary", table.title, tables=(table,))]


def main(section: Section) -> list[Part]:
    """Every configuration with a result."""
    table = tables.main(section)
    return [Part("main", table.title, tables=(table,))]


def samples(section: Section) -> list[Part]:
    """Sample grids from the same noise, dense beside sparse."""
    return [Part("samples", "Samples", pictures=grids.html(section))]


def curves(section: Section) -> list[Part]:
    """FID and validation loss of every trial."""
    return [
        Part("curves", f"{section.early_name} of every trial", figures.training_curves(section),
             "A line per trial, confirmed ones stronger; a cross where a trial was stopped or failed."),
        Part("losses", "Validation loss of every trial", figures.training_curves(section, "validation_loss"),
             "Masked EMA weights on fixed noise and timesteps."),
    ]  # fmt: skip


def trials(section: Section) -> list[Part]:
    """Every trial, whatever became of it."""
    table = tables.trials(section)
    return [Part("trials", table.title, tables=(table,), folded=True)]

from __future__ import annotations

import pytest
from synthetic_records import Folder, facts

from analysis import measured
from analysis.load import read
from analysis.sections import Section, split


def test_ratios_by_hand(grid: Section) -> None:
    (part,) = measured.parts(grid)
    static = next(trace for trace in part.figure.data if trace.name == "static")
    # FLOPs 1 - S; the grid's seconds are (1 + S) times dense's.
    assert sorted(zip(static.x, static.y, strict=True)) == [
        (pytest.approx(1 - s), pytest.approx(1 + s)) for s in (0.9, 0.5, 0.25)
    ]
    said = part.sentences[0].replace("\N{NO-BREAK SPACE}", " ")
    assert said.endswith("75 % of dense's training FLOPs by count, 125 % of its seconds per step by the clock.")


def test_nothing_without_dense(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(400, 10.0)])
    (section,) = split(read(folder.path))
    assert measured.parts(section) == []

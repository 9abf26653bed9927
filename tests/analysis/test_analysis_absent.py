from __future__ import annotations

from synthetic_records import Folder, facts

from analysis import absent
from analysis.load import read
from analysis.sections import Section, split


def told(folder: Folder) -> str:
    (section,) = split(read(folder.path))
    return " ".join(sentence for part in absent.parts(section) for sentence in part.sentences)


def test_a_whole_grid_lacks_nothing(grid: Section) -> None:
    assert absent.parts(grid) == []


def test_each_missing_thing_is_named_with_its_reason(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5, stage="search"), [(400, 10.0)])
    said = told(folder)
    for text in (
        "there is no dense result",
        "nothing is confirmed yet",
        "one p or none",
        "raysparse evaluate",
        "for each p",
    ):
        assert text in said
    assert "`" not in said  # the page is no Markdown


def test_one_seed_each_is_said(folder: Folder) -> None:
    folder.add(facts(), [(400, 10.0)])
    folder.add(facts("static", 0.5), [(400, 11.0)])
    said = told(folder)
    assert "no configuration has two seeds" in said
    assert "no dense result" not in said
    assert "prune ratio" not in said  # no method here has one

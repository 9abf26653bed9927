from __future__ import annotations

import json

import pytest
from synthetic_records import Folder, facts

from analysis import layers
from analysis.load import read
from analysis.sections import Section, split


def only(folder: Folder) -> Section:
    (section,) = split(read(folder.path))
    return section


def test_densities_of_each_methods_best(grid: Section) -> None:
    rows = layers.densities(grid)
    assert set(rows["method"]) == {"magran", "rigl", "static"}
    rigl = rows[rows["method"].eq("rigl")]
    assert dict(zip(rigl["layer"], rigl["density"], strict=True)) == {"gru.weight": 0.75, "out.weight": 1.0}
    assert rigl["seed"].unique().tolist() == [1]
    figure = layers.figure(grid, rows)
    assert list(figure.layout.yaxis.ticktext) == ["gru.weight", "out.weight"]


def test_densities_are_of_methods_of_any_budget(two_budgets: Section) -> None:
    assert layers.densities(two_budgets)["method"].tolist() == ["rigl", "static"]  # no FID is held against another here


def test_the_topology_of_dynamic_methods_only(grid: Section) -> None:
    figure = layers.topology(grid)
    assert figure is not None
    assert {trace.name for trace in figure.data} == {"magran", "rigl"}
    assert {y for trace in figure.data for y in trace.y if y == y} == {0.25, 0.025}  # p / 2


@pytest.mark.parametrize("text", ["no json", "[]", '{"a": "b"}', "null"])
def test_a_damaged_density_is_left_out(folder: Folder, text: str) -> None:
    folder.add(facts("static", 0.5), [(400, 10.0)], layer_density=text, topology_updates=0)
    assert layers.parts(only(folder)) == []


def test_a_record_that_is_gone_is_left_out(folder: Folder) -> None:
    path = folder.add(facts("static", 0.5), [(400, 10.0)], topology_updates=0)
    section = only(folder)
    path.unlink()
    assert layers.densities(section).empty


def test_many_layers_are_counted_not_named(folder: Folder) -> None:
    names = {f"<b>layer {number}": 0.5 for number in range(80)}
    folder.add(facts("static", 0.5), [(400, 10.0)], layer_density=json.dumps(names))
    section = only(folder)
    figure = layers.figure(section, layers.densities(section))
    assert figure.layout.yaxis.title.text == "80 layers, first on top"
    assert "<b>layer" not in str(figure.data[0].text)

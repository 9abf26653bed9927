from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic_records import Folder, facts

from analysis import masks
from analysis.load import read
from analysis.sections import Section, split


def bits(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


def test_the_overlap_by_hand() -> None:
    one = {"a": bits(1, 1, 0, 0), "b": bits(1, 1)}
    other = {"a": bits(0, 1, 1, 0), "b": bits(1, 1)}
    # In common: one of a, both of b; four active each. By chance a shares 2 x 2 / 4 = 1, the dense b both: 3 of 4 too.
    assert masks.overlap(one, other) == (0.75, 0.75)
    assert masks.overlap(one, one) == (1.0, 0.75)


def test_chance_is_what_independent_masks_share() -> None:
    draws = np.random.default_rng(0)
    one, other = ({"a": (draws.random(20_000) < 0.1).astype(np.uint8)} for _ in range(2))
    shared, chance = masks.overlap(one, other)
    assert chance == pytest.approx(0.1, abs=0.01)
    assert shared == pytest.approx(chance, abs=0.02)


def test_masks_of_other_models_do_not_compare() -> None:
    assert math.isnan(masks.overlap({"a": bits(1)}, {"b": bits(1)})[0])
    assert math.isnan(masks.overlap({"a": bits(1)}, {"a": bits(1, 0)})[0])
    assert math.isnan(masks.overlap({"a": bits(0)}, {"a": bits(0)})[0])


def test_seeds_of_the_grid(grid: Section) -> None:
    table, drift = masks.parts(grid)
    frame = table.tables[0].frame.set_index("method")
    # f0, 3c, 0f: neighbours share two of four, the outer ones none; a dense layer of eight is shared by all.
    assert frame.loc["static", "pairs"] == 3
    assert frame.loc["static", "overlap_mean"] == pytest.approx((10 / 12 + 10 / 12 + 8 / 12) / 3)
    assert frame.loc["static", "chance"] == pytest.approx((4 * 4 / 8 + 8) / 12)
    static = next(trace for trace in drift.figure.data if trace.name.startswith("static"))
    # The first report's c3 against f0: two of four still active; 3c: none; 0f: two.
    assert [y for y in static.y if y == y] == pytest.approx([1, 10 / 12, 1, 8 / 12, 1, 10 / 12])


def test_records_without_samples_say_so(finished: Section) -> None:
    (part,) = masks.parts(finished)
    assert part.sentences == ("Not shown: these records were written before masks were sampled.",)


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}', '{"a": "xyz"}'])
def test_a_damaged_sample_is_none(folder: Folder, text: str) -> None:
    path = folder.add(facts("static", 0.5), [(400, 10.0)], mask_sample=text)
    assert masks.read(str(path)) == []
    assert masks.read(str(path) + "x") == []


def test_dense_alone_has_no_masks(folder: Folder) -> None:
    folder.add(facts(), [(400, 10.0)])
    (section,) = split(read(folder.path))
    assert masks.parts(section) == []

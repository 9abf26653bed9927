from __future__ import annotations

import re
from collections import Counter

import pytest
from synthetic_records import Folder, facts, hostile

from analysis.load import read
from analysis.parts import Part, overall, parts
from analysis.sections import Section, split


def check(found: list[Part]) -> None:
    """What the page and the files beside it rely on."""
    assert [name for name, count in Counter(part.name for part in found).items() if count > 1] == []
    tables = Counter(table.name for part in found for table in part.tables)
    assert [name for name, count in tables.items() if count > 1] == []
    for part in found:
        assert re.fullmatch("[a-z0-9_]+", part.name)
        assert part.title
        assert part.figure is None or part.caption
        assert part.figure is None or part.figure.data
        for table in part.tables:
            assert re.fullmatch("[a-z0-9_]+", table.name)
            for text in (table.csv(), table.markdown(), table.latex()):
                assert text.endswith("\n")


def test_a_whole_grid_has_all_parts(grid: Section) -> None:
    found = list(parts(grid))
    check(found)
    names = [part.name for part in found]
    assert names[:2] == ["summary", "sparsity"]
    assert names[-1] == "trials"
    assert {
        "kid", "flops", "flops_train", "params", "seconds", "pareto", "improvement", "profile", "main", "prune_ratio",
        "static_dynamic", "sampling_steps", "dynamics", "dynamics_flops", "dynamics_seconds", "flops_and_seconds",
        "curves", "losses", "layers", "masks", "mask_drift", "topology",
    } <= set(names)  # fmt: skip


def test_points_of_configurations_carry_what_a_page_filters_by(grid: Section) -> None:
    for part in parts(grid):
        for trace in part.figure.data if part.figure else ():
            if trace.customdata is not None:
                assert len(trace.customdata) == len(trace.x)
                assert all(len(row) == 3 and isinstance(row[0], str) for row in trace.customdata)


@pytest.mark.parametrize(
    ("trials", "state"),
    [
        ([("rigl", 0.5, "search", [])], "RUNNING"),
        ([("rigl", 0.5, "search", [(100, 9.0)])], "STOPPED"),
        ([("rigl", 0.5, "search", [(100, 9.0)])], "FAILED"),
        ([("dense", 0.0, "search", [(400, 9.0)])], "COMPLETED"),
        ([("dense", 0.0, "confirm", [(400, 9.0)])], "COMPLETED"),
        ([("rigl", 0.5, "confirm", [(400, 9.0)])], "COMPLETED"),
        ([("rigl", 0.5, "confirm", [(400, float("nan"))])], "COMPLETED"),
        ([("rigl", 0.5, "single", [(400, 0.0)]), ("dense", 0.0, "single", [(400, -1.0)])], "COMPLETED"),
        ([("dense", 0.0, "confirm", [(400, 9.0)]), ("static", 0.5, "search", [(400, 8.0)])], "COMPLETED"),
        ([("dense", 0.0, "search", [(400, 9.0)]), ("static", 0.5, "confirm", [(400, 8.0)])], "COMPLETED"),
    ],
)
def test_every_state_of_a_sweep_has_parts(
    folder: Folder, trials: list[tuple[str, float, str, list[tuple[int, float]]]], state: str
) -> None:
    for method, sparsity, stage, curve in trials:
        folder.add(facts(method, sparsity, stage=stage), curve, state)
    (section,) = split(read(folder.path))
    check(list(parts(section)))


def test_without_kid_losses_or_flops(folder: Folder) -> None:
    for method, sparsity in (("dense", 0.0), ("rigl", 0.5)):
        for seed in (1, 2):
            folder.add(
                facts(method, sparsity, seed, flops_inference_dense_true=0.0, flops_train_dense_true=0.0),
                [(200, 9.0), (400, 8.0 + seed)], kid=None, kid_std=None, validation_loss=None, train_loss=None,
            )  # fmt: skip
    (section,) = split(read(folder.path))
    found = list(parts(section))
    check(found)
    assert "kid" not in {part.name for part in found}
    assert "losses" not in {part.name for part in found}


def test_hostile_names_stay_text_everywhere(folder: Folder) -> None:
    sections = split(read(hostile(folder).path))
    assert len(sections) == 2
    for section in sections:
        found = list(parts(section))
        check(found)
        for part in found:
            if part.figure is not None:
                part.figure.update_traces(customdata=None)
                text = part.figure.to_json()
                assert "<script" not in text
                assert "\\u003cscript" not in text
                assert "<img" not in text
                assert "\\u003cimg" not in text
            for table in part.tables:
                assert not re.search(r"(?<!\\)<(script|img)", table.markdown())
                assert not re.search(r"\\(input|write|href)", table.latex())
    check(list(overall(sections)))


@pytest.mark.slow
def test_every_figure_can_be_drawn_as_svg_and_pdf(grid: Section, finished: Section) -> None:
    pytest.importorskip("matplotlib")
    from analysis import vector

    for section in (grid, finished):
        for part in parts(section):
            if part.figure is not None:
                vector.draw(vector.describe(part.figure))  # raises where it would draw less than the figure says

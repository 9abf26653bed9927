from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from synthetic_records import Folder, facts

from analysis import importance
from analysis.load import read
from analysis.sections import Section, split


def only(folder: Folder) -> Section:
    (section,) = split(read(folder.path))
    return section


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Section:
    """60 trials whose FID depends on S alone, by far; p and the learning rate are drawn beside it."""
    folder = Folder(tmp_path_factory.mktemp("search"))
    draws = np.random.default_rng(0)
    for number in range(60):
        sparsity = float(draws.uniform(0.1, 0.9))
        method, p = ("rigl", float(10 ** draws.uniform(-1.3, -0.3))) if number % 2 else ("static", None)
        trial = facts(
            method, sparsity, stage="search", trial_id=f"t{number}", prune_ratio=p, lr=float(draws.uniform(1e-4, 1e-2))
        )
        folder.add(trial, [(400, 10 + 100 * sparsity)])
    folder.add(facts("static", 0.1, stage="search", trial_id="stopped"), [(100, 1.0)], "STOPPED")
    return only(folder)


def test_the_one_setting_that_matters_comes_first(search: Section) -> None:
    scores = importance.importances(importance.settings(search))
    assert next(iter(scores)) == "S"
    assert set(scores) == {"S", "method", "p", "optimizer.lr"} | (set(scores) & {"ΔTe"})
    assert sum(scores.values()) == pytest.approx(1)
    assert scores["S"] > 0.6
    assert scores == importance.importances(importance.settings(search))


def test_settings_are_those_that_vary(search: Section) -> None:
    rows = importance.settings(search)
    assert len(rows) == 60  # the stopped one has no result
    static = rows[rows["method"].eq("static")]
    assert static["p"].isna().all()
    assert rows["optimizer.lr"].dtype == np.float64


def test_importances_are_of_one_budget(folder: Folder) -> None:
    # The longer ones have S = .9 alone and are all lower: over both budgets S would be what matters.
    for number in range(22):
        steps, sparsity = (4000, 0.9) if number < 10 else (400, 0.25 + 0.05 * (number % 6))
        trial = facts("static", sparsity, stage="search", trial_id=f"t{number}", total_steps=steps, lr=0.01 * number)
        folder.add(trial, [(steps, 1.0 + number if number < 10 else 90.0 - number)])
    section = only(folder)
    assert len(importance.settings(section)) == 12
    part = importance.parts(section)[0]
    assert part.sentences[0].startswith("Over 12 search trials at 400 steps, of the budgets here the one with most;")


def test_a_list_is_one_value() -> None:
    text = "model.options.block_out_channels=[32, 64], optimizer.lr=0.001, sparse.pattern=block"
    assert importance._others(text) == {
        "model.options.block_out_channels": "[32, 64]",
        "optimizer.lr": 0.001,
        "sparse.pattern": "block",
    }
    assert importance._others("") == {}


def blocks(folder: Folder, recorded: bool) -> Section:
    """A search of B = 8, 16 and 32, where 16 is the default, which a config leaves out, and of two trials without B."""
    for number in range(12):
        size = (8, 16, 32)[number % 3]
        trial = facts("magran", 0.5, stage="search", trial_id=f"t{number:02d}", prune_ratio=0.1 + number / 100)
        config = json.loads(trial.config)
        config["sparse"] |= {"pattern": "block"} | ({"block": size} if size != 16 else {})
        left_out = {"sparse.other_layers": "element"} | ({"sparse.block": 16} if size == 16 else {})
        defaults = json.dumps(left_out) if recorded else None
        folder.add(dataclasses.replace(trial, config=json.dumps(config), defaults=defaults), [(400, 10.0 + size)])
    for number, left_out in enumerate(({"sparse.pattern": "element"}, {})):
        trial = facts(("magran", "dense")[number], 0.5 - number / 2, stage="search", trial_id=f"other{number}")
        folder.add(dataclasses.replace(trial, defaults=json.dumps(left_out) if recorded else None), [(400, 50.0)])
    return only(folder)


def test_a_setting_at_its_default_has_its_value(folder: Folder) -> None:
    section = blocks(folder, recorded=True)
    rows = importance.settings(section).set_index("trial_id")
    assert "sparse.other_layers" not in rows  # all have the default
    assert [rows["sparse.block"].get(name) for name in ("t00", "t01", "t02")] == [8, 16, 32]
    assert rows.loc[["other0", "other1"], "sparse.block"].isna().all()  # by element, and dense
    assert rows["sparse.pattern"].fillna("")[["t00", "other0", "other1"]].tolist() == ["block", "element", ""]
    (_, drawn) = importance.parts(section)
    assert drawn.caption.endswith("the method has no such setting, or no use for it.")


def test_a_record_that_says_no_defaults_may_have_them(folder: Folder) -> None:
    section = blocks(folder, recorded=False)
    assert importance.settings(section).set_index("trial_id")["sparse.block"].isna()["t01"]
    (_, drawn) = importance.parts(section)
    assert "the record is of an earlier version and leaves out a default" in drawn.caption


def test_parts_say_what_is_left_out(search: Section) -> None:
    names = [part.name for part in importance.parts(search)]
    assert names == ["importance", "parallel"]
    assert "trials that were stopped are not among them" in importance.parts(search)[0].sentences[0]


def test_lines_of_the_parallel_coordinates(search: Section) -> None:
    rows = importance.settings(search)
    figure = importance.parallel(search, rows)
    names = [str(name) for name in figure.layout.xaxis.ticktext]
    assert names[-1] == "FID (stroke_stats)"
    best = figure.data[-1]
    assert best.name == "best fifth"
    lines = np.array(best.y, dtype=float).reshape(12, len(names) + 1)
    lowest = rows["value"].nsmallest(12)
    span = rows["value"].max() - rows["value"].min()
    assert sorted(lines[:, -2]) == pytest.approx(sorted((lowest - rows["value"].min()) / span))
    assert np.isnan(lines[:, -1]).all()
    assert {"none"} <= {note.text for note in figure.layout.annotations}


def test_too_few_results_say_how_many(finished: Section) -> None:
    (part,) = importance.parts(finished)
    assert part.sentences == ("Not shown: 6 search trials have a result at full budget, 8 are needed.",)


def test_one_trial_of_a_method_is_no_warning(folder: Folder) -> None:
    folder.add(facts(stage="search"), [(400, 9.0)])  # the only one without S
    for number in range(10):
        sparsity = (0.5, 0.75, 0.9)[number % 3]
        folder.add(facts("static", sparsity, stage="search", trial_id=f"t{number}"), [(400, 10.0 + number)])
    first, _ = importance.parts(only(folder))
    assert sum(first.tables[0].frame["importance"]) == pytest.approx(1)
    assert "judged by these" in first.sentences[0]


def test_no_search_no_part(grid: Section) -> None:
    assert importance.parts(grid) == []


def test_equal_results_say_nothing(folder: Folder) -> None:
    for number in range(10):
        folder.add(facts("rigl", 0.5, stage="search", prune_ratio=0.1 + number / 100), [(400, 10.0)])
    (part,) = importance.parts(only(folder))
    assert part.sentences == ("Not shown: all results are equal.",)


def test_hostile_settings_do_no_harm(folder: Folder) -> None:
    for number in range(10):
        trial = facts("rigl", 0.5, stage="search", trial_id=f"t{number}", prune_ratio=0.1 + number / 100)
        config = trial.config.replace('"lr": 0.004', f'"lr": 0.004, "<b>": "<i>{number % 2}</i>, x=1"')
        folder.add(type(trial)(**(vars(trial) | {"config": config})), [(400, 10.0 + number // 2)])
    found, drawn = importance.parts(only(folder))
    assert all(math.isfinite(score) for score in found.tables[0].frame["importance"])
    assert "<b>" not in found.figure.to_json() + drawn.figure.to_json()
    assert "\\u003cb" not in found.figure.to_json() + drawn.figure.to_json()


def test_without_optuna_the_rest_is_shown(search: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    first, second = importance.parts(search)
    assert first.sentences == ("Not shown: Optuna is not installed here.",)
    assert second.figure is not None


def test_optuna_is_imported_when_asked_for() -> None:
    code = "import analysis.parts, analysis.importance, sys; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

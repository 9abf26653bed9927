from __future__ import annotations

import json

import pytest
from synthetic_grid import fill_grid
from synthetic_records import PROTOCOL, Folder, facts

from analysis import overall
from analysis.load import read
from analysis.sections import split


def test_a_row_per_task_and_no_fid_across(folder: Folder) -> None:
    fill_grid(folder)
    fill_grid(folder, dataset="kanjivg", protocol=json.dumps(json.loads(PROTOCOL) | {"generated": 10}))
    sections = split(read(folder.path))
    (part,) = overall.parts(sections)
    rows = part.tables[0].frame.set_index("dataset")
    assert rows.loc["kanjivg", ["dense_fid_mean", "fid_mean", "params_ratio"]].tolist() == pytest.approx(
        [12, 10, 0.75], rel=1e-4
    )
    assert rows.loc["hershey", "verdict"] == "no difference shown"
    assert rows.loc["hershey", "best"].startswith("rigl, S = 0.25, p = 0.05")
    assert "compare within a row" in part.tables[0].caption
    assert overall.parts(sections[:1]) == []


def test_full_beside_reduced_data(folder: Folder) -> None:
    for count, shift in ((None, 0.0), (100, 5.0)):
        for seed in (1, 2):
            for method, sparsity, fid in (("dense", 0.0, 10.0), ("rigl", 0.5, 9.0), ("rigl", 0.9, 20.0)):
                trial = facts(method, sparsity, seed, trial_id=f"{method}{sparsity}{seed}{count}")
                config = json.loads(trial.config)
                config["data"]["train_examples"] = count
                folder.add(type(trial)(**(vars(trial) | {"config": json.dumps(config)})), [(400, fid + shift + seed)])
    sections = split(read(folder.path))
    assert sorted(section.variant for section in sections) == ["", "first 100 training examples"]
    assert all(section.comparisons == 2 for section in sections)  # each has its own dense
    _, part = overall.parts(sections)
    lines = part.tables[0].markdown().splitlines()
    assert "FID (stroke_stats), all training examples" in lines[0]
    assert "FID (stroke_stats), first 100 training examples" in lines[0]
    assert lines[2].startswith("| dense | 0 | 11.50 ± 0.71 |")
    assert lines[3].startswith("| rigl | 0.5 | **<u>10.50 ± 0.71</u>** |")
    assert "| 25.00" not in lines[3]
    assert "26.50 ± 0.71" in lines[4]


def test_budgets_are_not_held_against_each_other(folder: Folder) -> None:
    for count in (None, 100):
        for seed in (1, 2):
            for method, sparsity, steps, fid in (
                ("dense", 0.0, 400, 10.0), ("static", 0.5, 400, 20.0), ("dense", 0.0, 800, 60.0),
                ("rigl", 0.5, 400, 9.0), ("rigl", 0.9, 800, 50.0),
            ):  # fmt: skip
                trial = facts(method, sparsity, seed, total_steps=steps, trial_id=f"{method}{steps}{seed}{count}")
                config = json.loads(trial.config)
                config["data"]["train_examples"] = count
                folder.add(type(trial)(**(vars(trial) | {"config": json.dumps(config)})), [(steps, fid + seed)])
    _, part = overall.parts(split(read(folder.path)))
    rows = part.tables[0].frame  # of 800 steps, the longest: nothing of 400
    assert rows[["method", "sparsity", "fid_mean_0"]].to_numpy().tolist() == [["dense", 0.0, 61.5], ["rigl", 0.9, 51.5]]


def test_the_overview_shows_dense_of_the_budget_of_the_best(folder: Folder) -> None:
    for dataset in ("hershey", "kanjivg"):
        for seed in (1, 2):
            folder.add(facts("dense", 0.0, seed, dataset=dataset, trial_id=f"d{dataset}{seed}"), [(400, 10.0 + seed)])
            longer = facts("rigl", 0.5, seed, dataset=dataset, total_steps=800, trial_id=f"r{dataset}{seed}")
            folder.add(longer, [(800, 8.0 + seed)])
    (part,) = overall.parts(split(read(folder.path)))
    assert part.tables[0].frame["dense_fid_mean"].isna().all()
    assert "**" not in part.tables[0].markdown()


def test_only_the_amount_of_data_may_differ(folder: Folder) -> None:
    for number, (count, change) in enumerate([(None, {}), (None, {"eta": 1.0}), (9, {"reference_hash": "ff"})]):
        trial = facts(trial_id=f"d{number}", protocol=json.dumps(json.loads(PROTOCOL) | change))
        config = json.loads(trial.config)
        config["data"]["train_examples"] = count
        folder.add(type(trial)(**(vars(trial) | {"config": json.dumps(config)})), [(400, 10.0 + number)])
    (group,) = overall.data_groups(split(read(folder.path)))
    assert sorted(section.variant for section in group) == ["", "first 9 training examples"]
    assert all(section.protocol["eta"] == 0.0 for section in group)


def test_conditional_models_are_a_task_of_their_own(folder: Folder) -> None:
    for options in ({}, {"num_classes": 10}):
        trial = facts(trial_id=f"d{len(options)}")
        config = json.loads(trial.config) | {"model": {"options": options}}
        folder.add(type(trial)(**(vars(trial) | {"config": json.dumps(config)})), [(400, 10.0)])
    sections = split(read(folder.path))
    assert sorted(section.variant for section in sections) == ["", "class-conditional"]
    assert [part.name for part in overall.parts(sections)] == ["overview"]  # no study of the amount of data
    assert any("class-conditional" in section.title for section in sections)

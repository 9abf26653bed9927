"""What is checked and made whole before a sweep starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysparse import config
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import preparing, tuner


def test_paths_are_made_whole_before_a_trials_process_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_of: Callable[..., Sweep]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYSPARSE_DATA", "prepared")
    sweep = sweep_of()
    near = sweep_of(base=sweep.base | {"data": sweep.base.get("data", {}) | {"source": "raw/file.npz"}})
    whole = preparing.with_whole_paths(near)
    assert whole.base["data"]["source"] == str(tmp_path / "raw/file.npz")
    assert whole.base["data"]["root"] == str(tmp_path / "prepared")
    assert whole.digest == near.digest == sweep.digest


TEACHERS = {"teacher": ["dense", "/other"], "start": ["teacher"]}


@pytest.mark.parametrize(
    ("base", "walk"),
    [
        ({"sparse": {"teacher": "dense", "start": "teacher"}}, {"grid": {"nm_ste": {}}}),
        ({"sparse": {"start": "teacher"}}, {"grid": {"nm_ste": {"teacher": ["dense"]}}}),
        ({"sparse": {"start": "teacher"}}, {"search": {"trials": 3, "axes": {"nm_ste": {"teacher": ["dense"]}}}}),
        ({}, {"search": {"trials": 3, "axes": {"nm_ste": {"start": ["scratch", "teacher"], "teacher": ["dense"]}}}}),
    ],
    ids=["base", "grid", "search", "search of both"],
)
def test_a_teacher_that_is_not_there_is_refused_before_anything_starts(
    base: dict[str, Any],
    walk: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sweep_of: Callable[..., Sweep],
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(base=sweep_of().base | base, asha=None, **{"search": None} | walk)
    with pytest.raises(UsageError, match=f"teacher {tmp_path}/dense is no folder"):
        tuner.run(sweep, tmp_path / "out", command="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("walk", "words"),
    [
        ({"grid": {"rigl": {"train.label_dropout": [0, 0.1]}}}, "'train.label_dropout': 0.1}: .*no null class"),
        ({"search": {"rigl": {"model.options.hiden": [8, 16]}}}, "'model.options.hiden': 8}: .*did you mean 'hidden'"),
        ({"search": {"rigl": {"model.options.layers": {"low": 0, "high": 2}}}}, "'model.options.layers': 0}: .*got 0"),
        ({"search": {"rigl": {"train.label_dropout": [0, 0.1]}}}, "'train.label_dropout': 0.1}: .*no null class"),
        ({"search": {"static": {"pattern": ["element", "block"]}}}, "'pattern': 'block'}: .*fits no layer"),
        ({"search": {"rigl": {"data.train_examples": [32, 10**6]}}}, "data.train_examples is 1000000, but the data"),
    ],
)
def test_a_choice_that_no_trial_can_have_is_refused_before_anything_starts(
    walk: dict[str, Any], words: str, tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    (kind, axes), *_ = walk.items()
    walks = {"search": {"trials": 3, "axes": axes}} if kind == "search" else {"search": None, "grid": axes}
    with pytest.raises(UsageError, match=words):
        tuner.run(sweep_of(asha=None, **walks), tmp_path / "out", command="")
    assert not list(tmp_path.iterdir())


def test_a_search_that_has_begun_goes_on_beside_trials_that_its_choices_ended(
    monkeypatch: pytest.MonkeyPatch, sweep_of: Callable[..., Sweep]
) -> None:
    monkeypatch.setattr("raysparse.train.setup.prepare_data", lambda trial: None)
    begun = sweep_of(asha=None, search={"trials": 3, "axes": {"rigl": {"model.options.layers": [0, 2]}}})
    with pytest.raises(UsageError, match="got 0"):
        preparing.prepare(begun)
    preparing.prepare(begun, choices=False)


def test_a_teacher_left_out_by_an_export_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_of: Callable[..., Sweep]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = sweep_of().base | {"sparse": {"teacher": config.LEFT_OUT, "start": "teacher"}}
    with pytest.raises(UsageError, match="do not say where its teacher lies"):
        tuner.run(sweep_of(base=base, asha=None, search=None, grid={"nm_ste": {}}), tmp_path / "out", command="")


def test_each_teacher_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_of: Callable[..., Sweep]
) -> None:
    looked: list[str | None] = []
    monkeypatch.setattr("raysparse.train.setup.check", lambda trial: looked.append(trial.sparse.setting("teacher")))
    monkeypatch.setattr("raysparse.train.setup.prepare_data", lambda trial: None)
    axes = {"nm_ste": {"teacher": ["/a", "/b"], "loss": ["noise", "teacher", "both"]}, "static": {"sparsity": [0.5]}}
    preparing.prepare(sweep_of(search=None, grid=axes, asha=None))
    assert looked == [None, "/a", "/b"]


def test_a_teacher_is_made_whole_wherever_the_file_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_of: Callable[..., Sweep]
) -> None:
    monkeypatch.chdir(tmp_path)
    points = [{"method": "nm_ste", "teacher": "dense", "start": "teacher"}]
    search = {"trials": 2, "axes": {"nm_ste": TEACHERS}, "seed_points": points}
    whole = preparing.with_whole_paths(sweep_of(base=sweep_of().base | {"sparse": {"teacher": "dense"}}, search=search))
    assert whole.base["sparse"]["teacher"] == str(tmp_path / "dense")
    assert whole.axes["nm_ste"]["teacher"] == (str(tmp_path / "dense"), "/other")
    assert whole.search
    assert whole.search.seed_points[0]["teacher"] == str(tmp_path / "dense")

"""Whose a results folder is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import control, folder
from raysparse.sweep.board import Ledger
from raysparse.sweep.journal import event


def test_a_sweep_is_read_back_as_it_was(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    folder.create(tmp_path, sweep_of(), "raysparse sweep tiny.yaml")
    sweep, command = folder.load(tmp_path)
    assert sweep.digest == sweep_of().digest
    assert command == "raysparse sweep tiny.yaml"


def test_another_sweeps_folder_is_refused(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    folder.create(tmp_path, sweep_of(), "")
    with pytest.raises(UsageError, match=r"belongs to another sweep, 'tiny'.*resume .* --space FILE$"):
        folder.refuse_if_taken(tmp_path, sweep_of(asha={"grace_steps": 4}))
    with pytest.raises(UsageError, match=r"give another folder$"):
        folder.refuse_if_taken(tmp_path, sweep_of(name="other"))


def test_the_same_sweep_again_is_sent_to_resume_or_to_the_report(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    folder.create(tmp_path, sweep_of(), "")
    with pytest.raises(UsageError, match="raysparse resume"):
        folder.refuse_if_taken(tmp_path, sweep_of())
    ledger = Ledger(tmp_path)
    ledger.add(event("finished"))
    ledger.close()
    with pytest.raises(UsageError, match="python -m analysis"):
        folder.refuse_if_taken(tmp_path, sweep_of())


def test_a_command_that_is_offered_can_be_typed_where_the_path_has_a_space(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    results = tmp_path / "my runs"
    folder.create(results, sweep_of(), "")
    with pytest.raises(UsageError, match=f"raysparse resume '{results}'$"):
        folder.refuse_if_taken(results, sweep_of())
    with pytest.raises(UsageError, match=f"raysparse ls '{results}'$"):
        control.retry(results, ["rigl-1"])


def test_a_folder_with_something_else_is_refused_and_one_of_a_failed_start_is_not(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    (tmp_path / "lock").touch()
    folder.refuse_if_taken(tmp_path, sweep_of())
    folder.refuse_if_taken(tmp_path / "new", sweep_of())
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty"):
        folder.refuse_if_taken(tmp_path, sweep_of())
    with pytest.raises(UsageError, match="is a file"):
        folder.refuse_if_taken(tmp_path / "thesis.tex", sweep_of())


def test_json_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"sweep\.json is damaged"):
        folder.read(tmp_path)


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with folder.locked(tmp_path), pytest.raises(UsageError, match="another process drives"), folder.locked(tmp_path):
        pass
    with folder.locked(tmp_path):
        pass


def test_no_sweep_and_a_changed_sweep_are_refused(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    with pytest.raises(UsageError, match=r"no sweep\.json"):
        folder.load(tmp_path)
    folder.create(tmp_path, sweep_of(), "")
    path = tmp_path / "sweep.json"
    content = json.loads(path.read_text())
    content["sweep"]["asha"]["grace_steps"] = 4
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="does not agree with its own digest"):
        folder.load(tmp_path)
    path.write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        folder.load(tmp_path)


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    def refuse(results: Path) -> None:
        with folder.locked(results):
            raise UsageError("too many workers")

    for results in ("new", "deep/er/new"):
        with pytest.raises(UsageError, match="too many"):
            refuse(tmp_path / results)
        assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="too many"):
        refuse(tmp_path / "empty" / "new")
    assert not list((tmp_path / "empty").iterdir())  # somebody made that one
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UsageError, match="too many"):
        refuse(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]

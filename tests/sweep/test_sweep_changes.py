"""A resume under another file, code or version: refused with the difference, or accepted on record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raysparse import cli, space
from raysparse.config import with_value
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import changes, folder, preparing, tuner
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import event, read
from raysparse.sweep.search import planned
from raysparse.train.versions import versions

POINT = {"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.5, "update_interval": 2}


@pytest.fixture
def begun(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> tuple[Path, Sweep]:
    """A sweep's folder with one finished trial, and nothing left to do."""
    sweep, out = preparing.with_whole_paths(sweep_of()), tmp_path / "out"
    folder.create(out, sweep, "raysparse sweep x.yaml")
    ledger = Ledger(out)
    trial = space.trial(sweep, POINT)
    ledger.add(event("stage", stage="search"))
    ledger.add(planned(trial, POINT, "search", 0))
    ledger.add(event("completed", stage="search", trial_id=trial.trial_id, step=8, fid=1.0))
    ledger.close()
    return out, sweep


def age(out: Path, **others: Any) -> None:
    """As if the sweep had begun under other versions."""
    content = json.loads((out / "sweep.json").read_text())
    content["versions"] |= others
    (out / "sweep.json").write_text(json.dumps(content))


def test_the_same_file_and_versions_have_no_difference(begun: tuple[Path, Sweep]) -> None:
    out, sweep = begun
    assert changes.differences(out) == changes.differences(out, sweep) == []
    changes.refuse(out, [])
    age(out, cpu="another", gpu="another")
    assert changes.differences(out) == []


def test_another_version_or_code_is_refused_by_name(begun: tuple[Path, Sweep]) -> None:
    out, _ = begun
    age(out, ray="2.59.0", code="0123456789")
    now = versions()
    with pytest.raises(
        UsageError, match=r"code 0123456789 then, .* ray 2\.59\.0 then, .* now\. .*--accept-changes"
    ) as said:
        tuner.resume(out)
    assert f"ray 2.59.0 then, {now['ray']} now" in str(said.value)
    assert [item.kind for item in read(out / "journal.jsonl")][-1] == "completed"  # nothing was done


def test_a_changed_space_is_refused_with_what_changed(
    begun: tuple[Path, Sweep], sweep_of: Callable[..., Sweep]
) -> None:
    out, _ = begun
    wider = sweep_of(asha={"grace_steps": 4, "reduction_factor": 2})
    with pytest.raises(UsageError, match=r"asha\.grace_steps 2 then, 4 now"):
        tuner.resume(out, space_file=wider)


def test_a_trial_whose_settings_were_changed_in_the_journal_is_refused(begun: tuple[Path, Sweep]) -> None:
    out, sweep = begun
    trial = space.trial(sweep, POINT, seed=7)
    line = planned(trial, POINT, "search", 1)
    assert line.config
    with closing(Ledger(out)) as ledger:
        ledger.add(dataclasses.replace(line, config=with_value(line.config, "optimizer.lr", 9.0)))
    with pytest.raises(UsageError, match=rf"journal\.jsonl: trial {trial.trial_id} has the settings of rigl-.*copy"):
        tuner.resume(out)


def test_what_is_accepted_is_recorded_and_holds(begun: tuple[Path, Sweep], sweep_of: Callable[..., Sweep]) -> None:
    out, sweep = begun
    age(out, ray="2.59.0")
    more = preparing.with_whole_paths(sweep_of(asha={"grace_steps": 4, "reduction_factor": 2}))
    found = changes.differences(out, more)
    assert len(found) == 2
    changes.accept(out, more)
    assert folder.load(out)[0] == more
    assert changes.differences(out) == []
    with pytest.raises(UsageError, match="grace_steps"):
        changes.refuse(out, changes.differences(out, sweep))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {"train": {"steps": 16, "batch_size": 8}}}, "another base or kind of walk"),
        ({"search": None, "grid": {"dense": {}}}, "another base or kind of walk"),
        (
            {
                "search": {
                    "trials": 2,
                    "axes": {"rigl": {"sparsity": [0.9], "prune_ratio": [0.5], "update_interval": [2]}},
                }
            },
            "does not belong to the new space",
        ),
    ],
)
def test_another_sweep_is_refused_even_then(
    begun: tuple[Path, Sweep], sweep_of: Callable[..., Sweep], change: dict[str, Any], said: str
) -> None:
    out, sweep = begun
    base = change.get("base")
    other = preparing.with_whole_paths(sweep_of(**change | ({"base": sweep.base | base} if base else {})))
    before = (out / "sweep.json").read_bytes()
    with pytest.raises(UsageError, match=said):
        changes.accept(out, other)
    assert (out / "sweep.json").read_bytes() == before


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> list[Sweep]:
    """The sweeps that would have been driven, whose data is taken to be there."""
    found: list[Sweep] = []
    monkeypatch.setattr(preparing, "prepare", lambda sweep, **_: None)
    monkeypatch.setattr(tuner, "_drive", lambda results, *_: found.append(results))
    return found


def test_the_data_stays_where_it_was_unless_the_new_file_says_another_place(
    begun: tuple[Path, Sweep], sweep_of: Callable[..., Sweep], driven: list[Sweep]
) -> None:
    out, sweep = begun
    for name in ("first", "second"):
        (out / name).touch()
    placed = with_value(with_value(sweep.base, "data.source", str(out / "first")), "data.root", str(out))
    changes.accept(out, sweep_of(base=placed))
    asha = {"grace_steps": 4, "reduction_factor": 2}
    tuner.resume(out, space_file=sweep_of(asha=asha), accept_changes=True)
    assert driven == [folder.load(out)[0]] == [sweep_of(base=placed, asha=asha)]
    moved = with_value(sweep_of().base, "data.source", str(out / "second"))
    tuner.resume(out, space_file=sweep_of(base=moved, asha=asha), accept_changes=True)
    assert driven[1].base["data"] == placed["data"] | {"source": str(out / "second")}


def test_a_folder_is_as_it_was_where_what_is_accepted_cannot_start(
    begun: tuple[Path, Sweep], sweep_of: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise UsageError("has no public download; give --path")

    monkeypatch.setattr(preparing, "prepare", missing)
    out, _ = begun
    before = {name: (out / name).read_bytes() for name in ("sweep.json", "journal.jsonl")}
    with pytest.raises(UsageError, match="no public download"):
        tuner.resume(out, space_file=sweep_of(asha=None), accept_changes=True)
    assert {name: (out / name).read_bytes() for name in before} == before


def test_the_command_line_changes_the_file_or_the_sweep_as_it_began(
    begun: tuple[Path, Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sweep = begun
    given: list[Sweep] = []

    def resumed(results: Path, *, space_file: Sweep, **_: object) -> None:
        given.append(space_file)
        raise UsageError("enough")

    monkeypatch.setattr(tuner, "resume", resumed)
    words = ["resume", str(out), "--set", "search.trials=9", "--data", "raw.npz"]
    file = tmp_path / "new.yaml"
    file.write_text(yaml.safe_dump(sweep.model_dump(mode="json") | {"asha": None}))
    for more in ([], ["--space", str(file)]):
        assert isinstance(CliRunner().invoke(cli.app, [*words, *more]).exception, UsageError)
    for changed in given:
        assert changed.search
        assert (changed.search.trials, changed.base["data"]["source"]) == (9, "raw.npz")
    assert (given[0].asha, given[1].asha) == (sweep.asha, None)


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_sweep_is_extended_by_accepting_a_wider_grid(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    def of(sparsities: list[float]) -> Sweep:
        return sweep_of(search=None, asha=None, confirm=None, grid={"static": {"sparsity": sparsities}})

    out = tmp_path / "out"
    tuner.run(of([0.5]), out, command="", num_cpus=1, temp_dir=ray_home)
    first = Board.load(out)
    assert first.finished
    summary = tuner.resume(out, space_file=of([0.5, 0.75]), accept_changes=True, num_cpus=1, temp_dir=ray_home)
    assert summary.board.finished
    assert list(summary.board.rows)[: len(first.rows)] == list(first.rows)
    assert len(summary.board.rows) == len(first.rows) + 1
    assert all(row.state == "COMPLETED" for row in summary.board.rows.values())
    (accepted,) = [item for item in read(out / "journal.jsonl") if item.kind == "accepted"]
    assert "grid.static.sparsity [0.5] then, [0.5, 0.75] now" in str(accepted.reason)

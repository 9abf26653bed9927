"""Checkpoints: which are kept and why, that the others go safely, within the budget and by `raysparse gc`."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from recorded_trials import record
from typer.testing import CliRunner

from raysparse import space
from raysparse.cli import app
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import folder, limits, objectives, storage, trainable, tuner
from raysparse.sweep.board import Ledger
from raysparse.sweep.journal import event, read
from raysparse.sweep.limits import Guard, Limits
from raysparse.sweep.search import planned
from raysparse.sweep.storage import LEFTOVER, Budget, Store
from raysparse.train import restored

SIZE = 1000  # bytes of each checkpoint here


class Made:
    """A sweep's folder with trials that never ran."""

    def __init__(self, results: Path, sweep: Sweep) -> None:
        self.results, self.sweep = results, sweep
        folder.create(results, sweep, "test")
        self.ledger = Ledger(results)

    def trial(self, point: dict[str, Any], *ends: tuple[str, int, float | None], flops: float = 1.0, **of: Any) -> str:
        """A trial, its events, and a checkpoint of each step with a FID. of: stage, by, reason."""
        stage = of.pop("stage", "search")
        trial = space.trial(self.sweep, point, seed=1 if stage == "confirm" else None)
        name = trial.trial_id
        self.ledger.add(planned(trial, point, stage))
        for kind, step, fid in ends:
            self.ledger.add(event(kind, stage=stage, trial_id=name, step=step, fid=fid, **of))  # type: ignore[arg-type]
            if fid is not None:
                self.checkpoint(name, step)
        fids = {step: fid for _, step, fid in ends if fid is not None}
        record(self.results, trial, fids, "COMPLETED", stage=stage, flops_inference_true=flops)
        return name

    def checkpoint(self, name: str, step: int) -> Path:
        path = self.results / "checkpoints" / name / f"step-{step:09d}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "weights.safetensors").write_bytes(b"x" * SIZE)
        return path

    def why(self, **driven: bool) -> dict[tuple[str, int], str | None]:
        """(trial, step) -> why it is kept, None where it is spare."""
        found = Store(self.results, self.ledger.board, self.sweep).survey(driven=driven.get("driven", False))
        return {(one.trial_id, one.step): one.why if one.kept else None for one in found}

    def steps(self, name: str) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.results / "checkpoints" / name).glob("step-*"))


@pytest.fixture
def made(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> Iterator[Made]:
    one = Made(tmp_path, sweep_of(storage={"checkpoints": "5KB"}))
    yield one
    one.ledger.close()


def static(sparsity: float) -> dict[str, Any]:
    return {"method": "static", "sparsity": sparsity}


def rigl(prune_ratio: float) -> dict[str, Any]:
    return {"method": "rigl", "sparsity": 0.5, "prune_ratio": prune_ratio, "update_interval": 2}


def filled(made: Made) -> dict[str, str]:
    """One trial of each kind. Rungs are at 2 and 4 of 8 steps."""
    return {
        "dense": made.trial({"method": "dense"}, ("report", 6, 9.0), ("completed", 8, 5.0), flops=10),
        "front": made.trial(static(0.5), ("report", 2, 8.0), ("report", 6, 7.6), ("completed", 8, 6.0), flops=5),
        "beaten": made.trial(static(0.75), ("report", 6, 9.0), ("completed", 8, 7.0), flops=6),
        "stopped": made.trial(static(0.9), ("stopped", 2, 20.0), flops=1),
        "best at 4": made.trial(rigl(0.1), ("report", 2, 9.0), ("stopped", 4, 7.5), flops=5),
        "open": made.trial(rigl(0.2), ("report", 2, 9.0), ("report", 4, 8.0), flops=5),
        "failed": made.trial(rigl(0.3), ("report", 4, 9.5), ("failed", 4, 9.5), reason="lost"),
        "person": made.trial(rigl(0.4), ("stopped", 4, 9.9), by="me@here", reason="by me"),
        "confirmed": made.trial(static(0.5), ("report", 6, 7.0), ("completed", 8, 6.5), stage="confirm"),
    }  # fmt: skip


def test_what_an_open_trial_keeps_is_what_it_writes() -> None:
    assert storage.OF_OPEN == trainable.KEEP_CHECKPOINTS


def test_what_is_kept_and_why(made: Made, tmp_path: Path) -> None:
    made.checkpoint("a-stranger", 3)
    names = filled(made)
    why = made.why()
    front = "on the Pareto front of fid and flops_inference"
    assert why == {
        ("a-stranger", 3): "not of a trial of this sweep",
        (names["dense"], 6): None,
        (names["dense"], 8): front,  # no FID is lower
        (names["front"], 2): None,
        (names["front"], 6): None,
        (names["front"], 8): front,
        (names["beaten"], 6): None,
        (names["beaten"], 8): None,  # more FLOPs and a higher FID
        (names["stopped"], 2): None,
        (names["best at 4"], 2): None,
        (names["best at 4"], 4): "the best at rung 4",
        (names["open"], 2): "the trial is open and goes on from it",
        (names["open"], 4): "the trial is open and goes on from it",
        (names["failed"], 4): "`raysparse retry` goes on from it: failed",
        (names["person"], 4): "`raysparse retry` goes on from it: stopped",
        (names["confirmed"], 6): None,
        (names["confirmed"], 8): "a confirmed result",
    }
    store = Store(tmp_path, made.ledger.board, made.sweep)
    gone = store.remove(one for one in store.survey(driven=False) if not one.kept)
    assert {(one.trial_id, one.step) for one in gone} == {name for name, reason in why.items() if reason is None}
    assert not (tmp_path / "checkpoints" / names["stopped"]).exists(), "no empty folder is left"
    assert made.why() == {name: reason for name, reason in why.items() if reason is not None}


def test_what_may_get_a_second_chance_is_kept(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    rules = {"grace_steps": 2, "reduction_factor": 2, "second_chances": 1}
    made = Made(tmp_path, sweep_of(asha=rules))
    best, *others = [made.trial(rigl(p), ("stopped", 2, 20 * p)) for p in (0.2, 0.3, 0.4)]
    made.trial(static(0.5), ("report", 2, 1.0), ("completed", 8, 1.0))
    why = made.why()
    assert why[best, 2] == "it may get a second chance"
    assert [why[name, 2] for name in others] == [None, None]
    made.ledger.add(event("second_chance", stage="search", trial_id=best, number=9))
    assert "open" in str(made.why()[best, 2])
    made.ledger.close()


def test_a_completed_trial_without_a_readable_record_is_kept(made: Made) -> None:
    names = filled(made)
    (made.results / "records" / f"{names['beaten']}.parquet").write_bytes(b"no parquet")
    assert made.why()[names["beaten"], 8] == "on the Pareto front of fid and flops_inference"


def test_nothing_of_a_trial_that_a_process_holds_goes(made: Made) -> None:
    name = made.trial(static(0.9), ("report", 2, 9.0), ("stopped", 4, 20.0))
    made.trial(static(0.5), ("report", 2, 1.0), ("report", 4, 1.0))
    lock = made.results / "trials" / name / "lock"
    lock.parent.mkdir(parents=True)
    store = Store(made.results, made.ledger.board, made.sweep)
    spare = [one for one in store.survey(driven=True) if not one.kept]
    assert [(one.trial_id, one.step) for one in spare] == [(name, 2), (name, 4)]
    with lock.open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert store.remove(spare) == []
        assert made.steps(name) == [2, 4]
    assert store.remove(spare) == spare
    assert store.remove(spare) == [], "gone is gone"


def test_a_kill_while_removing_leaves_nothing_that_is_taken_for_a_checkpoint(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = made.trial(static(0.9), ("report", 2, 9.0), ("stopped", 4, 20.0))
    made.trial(static(0.5), ("report", 2, 1.0), ("report", 4, 1.0))
    store = Store(made.results, made.ledger.board, made.sweep)

    def killed(path: Path, **_: Any) -> None:
        (Path(path) / "weights.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.remove(one for one in store.survey(driven=False) if (one.trial_id, one.step) == (name, 4))
    monkeypatch.undo()
    assert made.steps(name) == [2]
    assert name not in [path.parent.name for path in restored.find(made.results) if path.name.endswith("4")]
    assert [key for key, why in made.why().items() if why is None] == [(name, LEFTOVER), (name, 2)]
    store.remove(one for one in store.survey(driven=False) if not one.kept)
    assert not (made.results / "checkpoints" / name).exists()


def test_what_an_open_trial_may_be_writing_is_left_alone_while_a_driver_runs(made: Made) -> None:
    name = made.trial(static(0.9), ("report", 2, 9.0))
    (made.results / "checkpoints" / name / ".writing-x").mkdir()
    assert made.why(driven=True)[name, LEFTOVER] is not None
    assert made.why(driven=False)[name, LEFTOVER] is None


def test_the_only_copy_that_an_open_trial_has_of_a_step_is_kept(made: Made) -> None:
    name = made.trial(static(0.9), ("report", 2, 9.0))
    whole = made.results / "checkpoints" / name / "step-000000002"
    whole.rename(whole.with_name(f".writing-{whole.name}"))  # killed while it replaced itself
    assert made.why()[name, LEFTOVER] == "the trial is open and goes on from it"
    whole.mkdir()
    assert made.why()[name, LEFTOVER] is None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(["report", "stopped", "completed", "failed"]), st.floats(1, 9), st.floats(1, 9)),
        min_size=1,
        max_size=8,
    ),
    budget=st.integers(1, 20),
)
def test_a_budget_takes_no_more_than_it_must_and_nothing_that_is_needed(
    tmp_path_factory: pytest.TempPathFactory,
    sweep_of: Callable[..., Sweep],
    kinds: list[tuple[str, float, float]],
    budget: int,
) -> None:
    made = Made(tmp_path_factory.mktemp("sweep"), sweep_of(storage={"checkpoints": budget * SIZE}))
    for number, (kind, fid, flops) in enumerate(kinds):
        step = 8 if kind == "completed" else 4
        made.trial(rigl(0.1 + 0.01 * number), ("report", 2, fid), (kind, step, fid), flops=flops)
    before = made.why(driven=True)
    needed = [key for key, reason in before.items() if reason]
    Budget(made.results, made.ledger, made.sweep).keep()
    left = made.why(driven=True)
    assert set(needed) <= set(left)
    assert len(left) == min(len(before), max(budget, len(needed)))
    for row in made.ledger.board.rows.values():
        if row.open:
            assert made.steps(row.trial_id) == [2, 4]
    made.ledger.close()


def test_the_least_wanted_goes_first_and_what_happens_is_said_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOOK_S", 0.0)
    budget = Budget(made.results, made.ledger, made.sweep)  # five checkpoints
    good = made.trial(static(0.5), ("report", 2, 1.0), ("completed", 8, 1.0))
    late = made.trial(static(0.75), ("report", 2, 2.0), ("stopped", 4, 7.0))
    budget.keep()
    assert (made.steps(good), made.steps(late)) == ([2, 8], [2, 4])  # four: nothing to do
    early = made.trial(static(0.9), ("stopped", 2, 3.0))
    early2 = made.trial(rigl(0.1), ("stopped", 2, 9.0))
    budget.keep()
    # First what is not the last of its trial, from the one that came least far.
    assert (made.steps(good), made.steps(late), made.steps(early), made.steps(early2)) == ([2, 8], [4], [2], [2])
    made.trial(rigl(0.2), ("report", 2, 8.0), ("report", 4, 8.0))
    budget.keep()
    assert (made.steps(good), made.steps(late), made.steps(early), made.steps(early2)) == ([8], [4], [2], [])
    for prune_ratio in (0.3, 0.4, 0.45):
        made.trial(rigl(prune_ratio), ("report", 2, 8.5), ("report", 4, 6.5))
        budget.keep()
    assert made.steps(late) == [], "others are better at its rung now"
    assert made.steps(good) == [8]
    notes = [str(item.reason) for item in read(made.results / "journal.jsonl") if item.kind == "note"]
    assert len(notes) == 2
    assert notes[0] == "storage.checkpoints 5 kB is reached: spare checkpoints are removed from now on"
    assert notes[1].startswith("checkpoints that are needed take 7 kB, over storage.checkpoints 5 kB: they are kept")


def test_max_disk_first_takes_what_is_spare(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DISK_LOOK_S", 0.0)
    name = made.trial(static(0.5), ("report", 2, 1.0), ("completed", 8, 1.0))
    enough = limits.disk_bytes(made.results) - SIZE // 2
    board = made.ledger.board
    budget = Budget(made.results, made.ledger, made.sweep)
    guard = Guard(Limits(max_disk_bytes=enough), made.sweep.resources, made.results, board, budget.make_room)
    assert guard.reached() is None
    assert made.steps(name) == [8]
    (said,) = [str(item.reason) for item in read(made.results / "journal.jsonl") if item.kind == "note"]
    assert said == "--max-disk is reached: spare checkpoints go first, 1 kB now"
    made.trial(static(0.9), ("report", 2, 1.0))
    assert "--max-disk" in str(guard.reached()), "an open trial's checkpoint is needed"


def test_gc_says_what_would_go_then_does_it(made: Made) -> None:
    names = filled(made)
    made.ledger.add(event("interrupted"))
    run, out = CliRunner().invoke, str(made.results)
    tried = json.loads(run(app, ["gc", out, "--dry-run", "--json"]).stdout)
    assert tried["dry_run"]
    assert all(Path(one["path"]).is_dir() for one in tried["gone"])
    done = json.loads(run(app, ["gc", out, "--json"]).stdout)
    assert (done["gone"], done["kept"]) == (tried["gone"], tried["kept"])
    assert done["gone_bytes"] == sum(one["size_bytes"] for one in done["gone"]) == SIZE * len(done["gone"]) > 0
    assert not any(Path(one["path"]).exists() for one in done["gone"])
    shown = run(app, ["gc", out]).stdout.splitlines()
    assert shown[0] == f"kept: {len(done['kept'])} checkpoints, {done['kept_bytes'] / 1000:.3g} kB"
    assert shown[-1] == "gone: 0 checkpoints, 0 B"
    assert any(names["confirmed"] in line and "a confirmed result" in line for line in shown)


def test_gc_passes_over_what_a_person_keeps_beside_the_checkpoints(made: Made) -> None:
    name = made.trial(static(0.5), ("report", 2, 9.0), ("report", 6, 7.0), ("completed", 8, 6.0))
    made.ledger.add(event("interrupted"))
    theirs = [made.results / "checkpoints" / name / other for other in ("step-abc", "step-000000006.bak")]
    for path in theirs:
        path.mkdir()
    done = CliRunner().invoke(app, ["gc", str(made.results), "--json"])
    assert [one["step"] for one in json.loads(done.stdout)["gone"]] == [2, 6]
    assert all(path.is_dir() for path in theirs)


def test_gc_keeps_away_from_a_sweep_that_is_driven(made: Made, tmp_path: Path) -> None:
    filled(made)
    before = made.why()
    with folder.locked(made.results):
        refused = CliRunner().invoke(app, ["gc", str(made.results)])
        assert isinstance(refused.exception, UsageError)
        assert "another process drives" in str(refused.exception)
        tried = CliRunner().invoke(app, ["gc", str(made.results), "--dry-run"])
        assert tried.exit_code == 0
        assert "would go" in tried.stdout
    assert made.why() == before
    no_sweep = CliRunner().invoke(app, ["gc", str(tmp_path / "records")])
    assert isinstance(no_sweep.exception, UsageError)


@pytest.mark.parametrize(("given", "expected"), [("50GB", 50 * 10**9), (123, 123), (None, None)])
def test_a_budget_is_bytes_or_text(sweep_of: Callable[..., Sweep], given: Any, expected: int | None) -> None:
    sweep = sweep_of(storage={"checkpoints": given})
    assert sweep.storage.checkpoints == expected
    assert sweep.digest == sweep_of().digest, "it is the same sweep, whatever is kept of it"
    assert space.parse(sweep.model_dump(mode="json"), "again") == sweep


@pytest.mark.parametrize("given", ["50 apples", -1, 0, [1]])
def test_what_is_no_budget(sweep_of: Callable[..., Sweep], given: Any) -> None:
    with pytest.raises(UsageError, match=r"storage\.checkpoints"):
        sweep_of(storage={"checkpoints": given})


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_of_two_objectives_within_a_budget_is_interrupted_and_goes_on(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LOOK_S", 0.0)
    base = sweep_of()
    assert base.search
    search = base.search.model_dump(mode="json") | {"sampler": "tpe", "objectives": ["fid", "flops_inference"]}
    rules = {"grace_steps": 2, "reduction_factor": 2, "explore_first": True, "second_chances": 2}
    sweep, out = sweep_of(search=search, asha=rules, storage={"checkpoints": 1}), tmp_path / "out"
    first = tuner.run(sweep, out, command="", limits=Limits(max_trials=3), num_cpus=1, temp_dir=ray_home)
    assert first.interrupted
    last = tuner.resume(out, num_cpus=1, temp_dir=ray_home)
    assert {row.state for row in last.board.rows.values()} <= {"COMPLETED", "STOPPED"}
    happened = list(read(out / "journal.jsonl"))
    again = [item.trial_id for item in happened if item.kind == "second_chance"]
    assert len(again) >= 2  # more, one at a time, until a sparse trial has been completed
    assert any(row.state == "COMPLETED" and row.method != "dense" for row in last.board.of_stage("search"))
    stopped = [item for item in happened if item.kind == "stopped"]
    assert {item.step for item in stopped[: len({item.trial_id for item in stopped})]} == {2}, "first all to one rung"
    for name in again:  # from the checkpoint where it was stopped, not from the start
        since = [item for item in happened if item.trial_id == name]
        place = [item.kind for item in since].index("second_chance")
        assert since[place + 1].kind == "started"
        steps = [item.step for item in since if item.fid is not None]
        assert steps == sorted(set(steps))
        log = (out / "trials" / name / "reports.jsonl").read_text()
        assert len(log.splitlines()) == len(steps)
    found = Store(out, last.board, sweep).survey(driven=False)
    # What ended last may still have been held by its process when the driver looked: gc takes that.
    assert sum(not one.kept for one in found) <= 2 * 2
    steps = {path.parent.name: int(path.name[5:]) for path in restored.find(out)}
    for row in last.board.rows.values():
        if row.stage == "confirm":
            assert steps[row.trial_id] == row.step
    assert not list(out.glob("checkpoints/*/.writing-*"))
    study = optuna.load_study(
        study_name="tiny", storage=JournalStorage(JournalFileBackend(str(out / "optuna" / "study.log")))
    )
    front = {trial.user_attrs["trial_id"] for trial in study.best_trials}
    assert front == {row.trial_id for row in objectives.front_of(last.board.rows.values())}
    assert {item.trial_id for item in last.board.chosen} == front
    said = Counter(str(item.reason).partition(" ")[0] for item in read(out / "journal.jsonl") if item.kind == "note")
    assert max(said.values(), default=0) <= 2  # of each kind one by each of the two drivers

"""Intermediate FIDs under a protocol of their own: what is compared while trials train, and what is a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from recorded_trials import record

from raysparse import pages, screen, space
from raysparse import results as records
from raysparse.asha import Asha
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.space import Confirm, Sweep
from raysparse.sweep import confirm, gauges, objectives, price, tuner, views
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.curves import Recorded
from raysparse.sweep.journal import Event, event, read
from raysparse.sweep.scheduler import Rungs
from raysparse.sweep.search import Suggested
from raysparse.sweep.simulate import simulate

EARLY = {"generated": 8, "ddim_steps": 1}
ASHA = Asha(grace_steps=2, reduction_factor=2)
FAR = 1000.0  # an intermediate FID is this and more here, a final one below 100: where they mix, it shows


@pytest.fixture
def early(sweep_of: Callable[..., Sweep]) -> Callable[..., Sweep]:
    """The tiny search with intermediate FIDs."""

    def build(**changes: Any) -> Sweep:
        base = sweep_of().base
        return sweep_of(base=base | {"evaluate": base["evaluate"] | {"intermediate": EARLY}}, **changes)

    return build


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path)
    yield opened
    opened.close()


def plan(ledger: Ledger, *names: str, costs: dict[str, float] | None = None) -> None:
    known = {"sparse": {}, "evaluate": {"intermediate": EARLY}}
    for name in names:
        ledger.add(
            event(
                "planned", stage="search", trial_id=name, method="rigl", total_steps=8, config=known, costs=costs,
                point={"method": "rigl"},
            )
        )  # fmt: skip


def tell(rungs: Rungs, name: str, step: int, intermediate_fid: float, fid: float | None = None) -> str:
    trial = SimpleNamespace(config={"trial_id": name}, trial_id=f"tune-{name}")
    return rungs.on_trial_result(None, trial, {"step": step, "fid": fid, "intermediate_fid": intermediate_fid})


@pytest.fixture
def searched(ledger: Ledger) -> Ledger:
    """a and b were completed, b with the better result and the worse intermediate FIDs; c was stopped."""
    plan(ledger, "a", "b", "c")
    rungs = Rungs(ledger, "search", 8, ASHA)
    assert tell(rungs, "b", 2, FAR + 5) == TrialScheduler.CONTINUE
    assert tell(rungs, "a", 2, FAR + 3) == TrialScheduler.CONTINUE
    assert tell(rungs, "c", 2, FAR + 9) == TrialScheduler.STOP
    assert tell(rungs, "b", 4, FAR + 4) == TrialScheduler.CONTINUE
    assert tell(rungs, "a", 4, FAR + 2) == TrialScheduler.CONTINUE
    assert tell(rungs, "a", 8, FAR + 1, fid=20.0) == TrialScheduler.STOP
    assert tell(rungs, "b", 8, FAR + 2, fid=10.0) == TrialScheduler.STOP
    return ledger


def test_asha_compares_intermediate_fids_and_the_journal_has_both(searched: Ledger) -> None:
    rows = searched.board.rows
    assert rows["c"].reason == "place 3 of 3 at step 2: intermediate FID 1009 above the cutoff 1004"
    assert rows["a"].fids == {2: FAR + 3, 4: FAR + 2, 8: FAR + 1}
    assert (rows["a"].fid, rows["a"].latest, rows["a"].result) == (20, FAR + 1, 20)
    assert (rows["c"].fid, rows["c"].latest) == (None, FAR + 9)
    again = Board.load(searched.board.folder or Path())
    assert again.rows == rows
    rebuilt = Rungs(searched, "search", 8, ASHA).rungs
    assert {value for at in rebuilt.values() for value in at.values()} == {FAR + n for n in (2, 3, 4, 5, 9)}
    assert views.rungs(searched.board, ASHA, 8) == {step: at for step, at in rebuilt.items() if step < 8}


def test_winners_are_chosen_by_their_results(searched: Ledger) -> None:
    rows = searched.board.of_stage("search")
    ((row, why),) = confirm.choose(rows, Confirm(seeds=(1,)))
    assert (row.trial_id, why) == ("b", "place 1 of 2 completed trials of rigl, FID 10")
    ((row, why),) = confirm.choose([searched.board.rows["c"]], Confirm(seeds=(1,)))
    assert why == "no trial of rigl was completed; the furthest: step 2 of 8, intermediate FID 1009"


def test_the_pareto_front_is_of_results(ledger: Ledger) -> None:
    plan(ledger, "a", costs={"params_active": 2.0})
    plan(ledger, "b", costs={"params_active": 1.0})
    rungs = Rungs(ledger, "search", 8, None)
    tell(rungs, "a", 8, FAR, fid=20.0)
    tell(rungs, "b", 8, FAR + 1, fid=10.0)  # better in both, but not by its intermediate FID
    assert [row.trial_id for row in objectives.front_of(ledger.board.rows.values())] == ["b"]
    assert objectives.words(ledger.board.rows["b"]) == "FID 10, params_active 1"


def test_what_is_shown_says_which_is_which(searched: Ledger) -> None:
    rows = list(searched.board.rows.values())
    assert [screen._cells(row)[7] for row in rows] == ["20.000", "10.000", "(1009.000)"]
    (hint,) = screen.intermediate_hint(rows)
    assert hint.startswith("in brackets: intermediate FID, of 8 samples and 1 DDIM steps: no result")
    assert screen.intermediate_hint(rows[:2]) == []
    assert pages.best_lines(views.best(rows)) == ["best of rigl (search): FID 10.000, b"]
    assert pages.best_lines(views.best(rows[2:])) == [
        "best of rigl (search): intermediate FID 1009.000, c at step 2, stopped"
    ]
    lines = [screen.event_line(item, searched.board) or "" for item in read(Path(searched._journal.path))]
    assert any(line.endswith("step 4/8, intermediate FID 1002.000") for line in lines)
    assert any(line.startswith("completed  a, FID 20.000, intermediate FID 1001.000") for line in lines)
    shown = {(name, value) for name, _, value in gauges.of_sweep(searched.board, ASHA, 0, 0.0) if "best" in name}
    assert shown == {("raysparse_best_fid", 10)}


def test_the_study_is_told_results_and_ranks_no_stopped_trial_among_them(
    ledger: Ledger, early: Callable[..., Sweep]
) -> None:
    search = Suggested(early(asha=None), ledger, lambda row: {"trial_id": row.trial_id})
    told: dict[str, Any] = {}
    for number, fid in enumerate([20.0, 10.0, None]):
        name = search.suggest(f"tune{number}")["trial_id"]  # type: ignore[index]
        row = ledger.board.rows[name]
        assert row.intermediate
        stopped = {"step": 2, "intermediate_fid": 1.0}  # lower than any result, and no rival of one
        ended = {"step": 8, "intermediate_fid": FAR + number, "fid": fid}
        ledger.add(event("stopped" if fid is None else "completed", trial_id=name, **(ended if fid else stopped)))
        search.on_trial_complete(f"tune{number}")
        told[name] = fid
    trials = {trial.user_attrs["trial_id"]: trial for trial in search.study.get_trials()}
    for name, fid in told.items():
        row = ledger.board.rows[name]
        assert trials[name].intermediate_values == row.fids
        if fid is not None:
            assert (trials[name].state, trials[name].value) == (TrialState.COMPLETE, fid)
    again = Suggested(early(asha=None), ledger, lambda row: {"trial_id": row.trial_id}).study.get_trials()
    known = ("number", "state", "values", "intermediate_values", "params")
    assert [[getattr(trial, name) for name in known] for trial in again] == [
        [getattr(trial, name) for name in known] for trial in search.study.get_trials()
    ]
    best = [trial.user_attrs["trial_id"] for _, trial in search._windowed._best]
    assert [told[name] for name in best] == [10.0, 20.0, None]


def test_two_trials_are_put_side_by_side_by_like_values(searched: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    board = searched.board
    view = views.View(Path(), board, None, SimpleNamespace(state="none", who=""))  # type: ignore[arg-type]
    monkeypatch.setattr(views, "_table", lambda results, trial_id: {"protocol": [SimpleNamespace(as_py=lambda: "{}")]})
    monkeypatch.setattr(views, "_column", lambda table, name: '{"generated": 16}')
    found = views.difference(view, board.rows["a"], board.rows["b"])["fids"]
    assert [(line["step"], line["of"]) for line in found] == [
        (2, "intermediate_fid"), (4, "intermediate_fid"), (8, "intermediate_fid"), (None, "fid"),
    ]  # fmt: skip
    assert found[-1]["fids"] == [20, 10]
    board.rows["b"].config = {"sparse": {}, "evaluate": {"intermediate": EARLY | {"ddim_steps": 2}}}
    found = views.difference(view, board.rows["a"], board.rows["b"])["fids"]
    assert [(line["step"], line["of"]) for line in found] == [(None, "fid")]


def test_all_trials_of_a_sweep_have_the_same_intermediate_protocol(sweep_of: Callable[..., Sweep]) -> None:
    axes = {"static": {"sparsity": [0.5], "evaluate.intermediate.generated": [8, 4]}}
    with pytest.raises(UsageError, match=r"evaluate.intermediate.generated is not an axis"):
        sweep_of(search={"trials": 2, "axes": axes})


def test_ids_of_known_trials_stay_and_a_dearer_intermediate_protocol_is_refused(early: Callable[..., Sweep]) -> None:
    with_one = space.trial(early(), {"method": "dense"})
    without = TrialConfig.model_validate(
        with_one.model_dump() | {"evaluate": with_one.evaluate.model_dump() | {"intermediate": None}}
    )
    assert "intermediate" not in without.content()["evaluate"]
    assert with_one.trial_id != without.trial_id
    assert with_one.intermediate
    assert (with_one.intermediate.evaluate.generated, with_one.intermediate.evaluate.ddim_steps) == (8, 1)
    assert without.intermediate is None
    dear = early().base["evaluate"] | {"intermediate": {"generated": 17}}
    with pytest.raises(UsageError, match=r"intermediate.generated 17 is above generated 16"):
        space.parse(early().model_dump() | {"base": early().base | {"evaluate": dear}}, "test")


def test_the_price_counts_each_evaluation_for_what_it_is(early: Callable[..., Sweep]) -> None:
    base = space.parsed_base(early())
    found = price.derived(base, 0.3)
    # A forward pass of an example takes .3 / 8 / 3 s: 8 samples of 1 DDIM step, then 16 of 2 as well.
    assert found == pytest.approx((0.3, 8 * 0.0125, 40 * 0.0125))
    free = early(asha=None, confirm=None)
    run = simulate(free, FlatCurves(), workers=1)
    planned = {"evaluation_s": 1.0, "last_evaluation_s": 5.0, "step_s": 0.0, "steps_per_trial": 8}
    planned["trials"] = [{"trial_id": "x", "flops_train_true": 1.0, "params_total": 1}]
    hours = price._figures(run, base, planned, price.TrainingFlops(planned), 1.0, None)["unit_hours"]
    assert hours == pytest.approx(6 * (3 * 1.0 + 5.0) / 3600)


class FlatCurves:
    """Curves that fall by one a report."""

    source = "made up"

    def curve(self, trial_id: str, config: dict[str, Any], world: int) -> tuple[tuple[int, float], ...]:
        return ((2, 9.0), (4, 8.0), (6, 7.0), (8, 6.0))


def test_recorded_curves_are_of_one_protocol(early: Callable[..., Sweep], tmp_path: Path) -> None:
    trial = space.trial(early(), {"method": "dense"})
    path = record(tmp_path, trial, {2: 0.0, 8: 40.0}, "COMPLETED", intermediate_protocol="early")
    table = records.read_trial(path)
    reports = records.reports_of(table)
    facts = records.Facts(**{name: table[name][0].as_py() for name in records.Facts.__dataclass_fields__})
    told = [
        records.dataclasses.replace(report, fid=fid, intermediate_fid=FAR - report.step)
        for report, fid in zip(reports, (None, 40.0), strict=True)
    ]
    records.write_trial(tmp_path, facts, records.Outcome("COMPLETED"), told)
    assert Recorded([tmp_path]).curve("x", trial.model_dump(mode="json"), 0)[-1] == (8, FAR - 8)
    assert price.recorded_seconds([tmp_path]) == (0.5, 3.0, 3.0)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_from_its_first_trial_to_the_report(
    tmp_path: Path, early: Callable[..., Sweep], ray_home: Path
) -> None:
    events: list[Event] = []
    out = tmp_path / "out"
    tuner.run(early(), out, command="test", on_event=events.append, num_cpus=2, temp_dir=ray_home)
    board = Board.load(out)
    assert {row.state for row in board.rows.values()} <= {"COMPLETED", "STOPPED"}
    for row in board.rows.values():
        check_row(out, row)
    assert any(row.state == "STOPPED" for row in board.rows.values())
    from analysis.report import write

    page = write(out).read_text(encoding="utf-8")
    assert "intermediate FID (oriented_energy), 8 samples, 1 DDIM steps" in page


def check_row(out: Path, row: Row) -> None:
    """Its records have a FID at the last step alone, and an intermediate one at each, as the journal has them."""
    rows = records.read_trial(out / "records" / f"{row.trial_id}.parquet").to_pylist()
    assert {report["step"]: report["intermediate_fid"] for report in rows} == row.fids
    assert [report["fid"] for report in rows if report["step"] < 8] == [None] * sum(step < 8 for step in row.fids)
    assert (rows[-1]["fid"] is None) == (row.state == "STOPPED")
    assert rows[-1]["fid"] == row.result
    own, cheap = (json.loads(rows[0][name]) for name in ("protocol", "intermediate_protocol"))
    assert (own["generated"], cheap["generated"], cheap["ddim_steps"]) == (16, 8, 1)
    assert row.intermediate

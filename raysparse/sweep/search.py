"""Which trials a stage has: a planned list (grid, confirm), or Optuna's suggestions, made as results come in."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study._tell import _tell_with_warning
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raysparse import rng, space
from raysparse.asha import Asha
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.space import Point, Sweep
from raysparse.sweep import chances, objectives
from raysparse.sweep.axes import distributions, first_points, new_point, quiet, sampler, suggest, to_params
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.journal import Event, event
from raysparse.sweep.tpe import WindowedTPE

TuneConfig = dict[str, Any]  # what Tune hands to a trial

# So many known points in a row, and a point not yet tried is taken instead of the sampler's: TPE settles on a method
# whose axes are short lists, the more so as the results of repeats are told to it.
PATIENCE = 20


def planned(
    trial: TrialConfig,
    point: Point,
    stage: str,
    number: int | None = None,
    costs: dict[str, float] | None = None,
) -> Event:
    """The event that makes a trial part of the sweep. costs: where the search has several objectives."""
    return event(
        "planned",
        stage=stage,
        trial_id=trial.trial_id,
        method=trial.sparse.method,
        point=point,
        seed=trial.seed,
        total_steps=trial.train.steps,
        config=trial.model_dump(mode="json"),
        number=number,
        costs=costs,
    )


class Listed(Searcher):  # type: ignore[misc]
    """Hands out the open trials of a stage that is planned in full, then second chances."""

    def __init__(
        self, ledger: Ledger, stage: str, config_of: Callable[[Row], TuneConfig], asha: Asha | None = None
    ) -> None:
        """asha: whose second chances these are; None: there are none."""
        super().__init__(metric="fid", mode="min")
        self._ledger, self._stage, self._asha = ledger, stage, asha
        self._todo = deque(row for row in ledger.board.of_stage(stage) if row.open)
        self._given: dict[str, Row] = {}  # Tune's id -> the trial
        self._config_of = config_of

    may_start: Callable[[Row], bool] = staticmethod(lambda row: True)  # whether a limit allows it

    def suggest(self, trial_id: str) -> TuneConfig | str | None:
        if not self._todo and (found := chances.take(self._ledger, self._asha)):
            self._todo.append(found)
        row = next(filter(self.may_start, self._todo), None)
        if row is None:
            return None if chances.running(self._ledger.board, self._stage) else str(Searcher.FINISHED)
        self._todo.remove(row)
        self._given[trial_id] = row
        return self._config_of(row)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to learn. Tune gives up a trial whose process dies as it is handed over: another one gets it."""
        row = self._given.pop(trial_id, None)
        if row is not None and row.open:
            self._todo.append(row)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is rebuilt from its journal")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing reads


class Suggested(OptunaSearch):  # type: ignore[misc]
    """OptunaSearch that tells the study the truth.

    As Ray has it, a trial stopped by ASHA is told COMPLETE, a failed one may stay RUNNING for ever, and a point asked
    for twice is trained twice. Here the study is told PRUNED with its intermediate values, FAIL, and the known result;
    and a draw depends on the study and the trial's number only, so that a resumed search goes on as if never killed.
    With several objectives Optuna takes no intermediate values: they go to the storage, and the costs to user_attrs.
    """

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        config_of: Callable[[Row], TuneConfig],
        storage: BaseStorage | None = None,
        check: Callable[[TrialConfig], None] = lambda trial: None,
        costs: Callable[[TrialConfig], dict[str, float]] = objectives.costs,
    ) -> None:
        """storage: an empty one, None for memory; check: a trial's own check, whose UsageError fails that trial; costs:
        asked of each new trial where there are several objectives."""
        assert sweep.search
        self._sweep, self._search, self._ledger = sweep, sweep.search, ledger
        self._config_of, self._check, self._costs = config_of, check, costs
        self._several = len(sweep.search.objectives) > 1
        self._first = first_points(sweep.search)
        self._asked: dict[str, list[optuna.Trial]] = {}  # our trial id -> its Optuna trials, repeats included
        self._ours: dict[str, str] = {}  # Tune's trial id -> ours
        self._reported: dict[int, set[int]] = {}  # number -> steps the study knows
        self._told: set[int] = set()  # numbers that have ended in the study
        self._count = 0  # trials of the study
        self._exhausted = False  # every point has been tried
        self._windowed = WindowedTPE(distributions(sweep.search))  # knows of these
        super().__init__(
            space=lambda trial: suggest(trial, self._search),
            metric=list(sweep.search.objectives) if self._several else "fid",
            mode=["min"] * len(sweep.search.objectives) if self._several else "min",
            sampler=sampler(sweep.search, 0, self._windowed),
            study_name=sweep.name,
            storage=storage,
        )
        self._metric, self._mode = "fid", "min"  # Tune looks for each of them in every report; costs are in none
        with quiet():
            self.study.set_metric_names(list(sweep.search.objectives))
        self._rebuild()
        self._todo = deque(row for row in ledger.board.of_stage("search") if row.open)
        self._planned = len(ledger.board.of_stage("search"))

    @property
    def study(self) -> optuna.Study:
        study: optuna.Study = self._ot_study
        return study

    may_start: Callable[[Row], bool] = staticmethod(lambda row: True)  # whether a limit allows it

    def suggest(self, trial_id: str) -> TuneConfig | str | None:
        if not self._todo and (found := self._new() or self._second_chance()):
            self._todo.append(found)
        row = next(filter(self.may_start, self._todo), None)
        if row is None:  # Tune asks again; where it has no trial it would do nothing else
            waiting = [each.trial_id for each in self._todo]
            return None if chances.running(self._ledger.board, "search", waiting) else str(Searcher.FINISHED)
        self._todo.remove(row)
        self._ours[trial_id] = row.trial_id
        return self._config_of(row)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._learn(self._ledger.board.rows[self._ours[trial_id]])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        row = self._ledger.board.rows[self._ours[trial_id]]
        self._learn(row)
        if row.open and row not in self._todo:  # given up as its process died when it was handed over: for another one
            self._todo.append(row)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is rebuilt from the journal."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is rebuilt from its journal")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing reads

    def _new(self) -> Row | None:
        """The next trial that was not there before, on record; None where there are enough or none is left."""
        board = self._ledger.board
        for attempt in itertools.count():
            if self._planned >= self._search.trials or self._exhausted:
                return None
            one_each = not any(self._search.axes.values())  # no method has an axis: there is nothing to draw
            over = attempt >= PATIENCE or (one_each and self._count >= len(self._first))
            fresh = self._untried() if over else None
            if over and fresh is None:
                self._exhausted = True
                reason = "every point of the space has been tried"
                if board.refused:
                    reason += ", or is of settings that do not go together"
                self._ledger.add(event("note", stage="search", reason=reason))
                return None
            asked, point = self._ask(fresh)
            try:
                trial = space.trial(self._sweep, point)
            except ValueError as error:
                number, reason = asked.number, str(error)
                self._ledger.add(event("refused", stage="search", point=point, number=number, reason=reason))
                self._tell(asked, None, TrialState.FAIL)
                continue
            costs, wrong = self._checked(trial) if trial.trial_id not in board.rows else (None, None)
            item = planned(trial, point, "search", asked.number, costs)
            name = str(item.trial_id)
            self._asked.setdefault(name, []).append(asked)
            if name not in board.rows:
                self._ledger.add(item)
                self._describe(asked, board.rows[name])
                self._planned += 1
                if wrong is None:
                    return board.rows[name]
                self._ledger.add(event("failed", stage="search", trial_id=name, reason=wrong))
                self._learn(board.rows[name])
                continue
            self._ledger.add(event("repeated", stage="search", trial_id=name, point=point, number=asked.number))
            self._describe(asked, board.rows[name])
            self._learn(board.rows[name])
        raise AssertionError

    def _checked(self, trial: TrialConfig) -> tuple[dict[str, float] | None, str | None]:
        """What else than FID the search minimises (None where it is FID alone), and why the trial fails, if so."""
        try:
            self._check(trial)
            found = self._costs(trial) if self._several else None
        except UsageError as error:
            return None, str(error)
        return found and {name: found[name] for name in self._search.objectives if name in found}, None

    def _second_chance(self) -> Row | None:
        """A stopped trial that goes on, for the study a new one at the same point; None where there is none."""
        number = self._count
        row = chances.take(self._ledger, self._sweep.asha, number)
        if row is not None:
            self._add(row, number)
        return row

    def _ask(self, fresh: Point | None) -> tuple[optuna.Trial, Point]:
        """An Optuna trial and its point: `fresh`, or one of the first points, or drawn."""
        number = self._count
        wanted = fresh or (self._first[number] if number < len(self._first) else None)
        self.study.sampler = sampler(self._search, number, self._windowed)
        if wanted is not None:
            self.study.enqueue_trial(to_params(self._search, wanted))
        with quiet():
            asked = self.study.ask()
            self._count = asked.number + 1
            if wanted is not None and not self._search.axes.get(wanted["method"]):
                return asked, wanted
            return asked, suggest(asked, self._search)

    def _untried(self) -> Point | None:
        """A point that has no trial, by the search's seed and the number of the next trial; None where there is none.

        Settings that do not go together are no point.
        """
        rows = self._ledger.board.rows

        def known(point: Point) -> bool:
            try:
                return space.trial(self._sweep, point).trial_id in rows
            except ValueError:
                return True

        return new_point(self._search, rng.key(self._search.seed, "untried", step=self._count), known)

    def _learn(self, row: Row) -> None:
        """Bring the row's trials in the study to where it is, those before a second chance to where it was then."""
        for trial in self._asked.get(row.trial_id, []):
            if trial.number in self._told:
                continue
            pruned = self._ledger.board.pruned.get(trial.number)
            known = self._reported.setdefault(trial.number, set())
            for step, fid in sorted((row.fids if pruned is None else pruned).items()):
                if fid is not None and step not in known:
                    self._report(trial, step, fid)
                    known.add(step)
            if pruned is not None or row.state == "STOPPED":
                self._tell(trial, None, TrialState.PRUNED)
            elif row.state == "COMPLETED":
                self._tell(trial, objectives.values(row, self._search.objectives), None)
            elif row.state == "FAILED":
                self._tell(trial, None, TrialState.FAIL)
            if pruned is not None or not row.open:
                self._told.add(trial.number)
                self._windowed.learn(self.study._storage.get_trial(trial._trial_id))

    def _tell(self, trial: optuna.Trial, values: Sequence[float] | None, state: TrialState | None) -> None:
        """As study.tell, but for the deep copy of the trial that it returns, .4 ms of a trial's 6."""
        _tell_with_warning(self.study, trial, values, state)

    def _report(self, trial: optuna.Trial, step: int, fid: float) -> None:
        if self._several:  # trial.report refuses
            self.study._storage.set_trial_intermediate_value(trial._trial_id, step, fid)
        else:
            trial.report(fid, step)

    def _describe(self, trial: optuna.Trial, row: Row) -> None:
        trial.set_user_attr("trial_id", row.trial_id)
        for name, cost in row.costs.items():
            trial.set_user_attr(name, cost)

    def _rebuild(self) -> None:
        """The study as the journal has it: the same numbers, values and states."""
        rows = self._ledger.board.rows
        of_number = {row.number: row for row in rows.values() if row.number is not None}
        of_number |= {repeat.number: rows[repeat.trial_id] for repeat in self._ledger.board.repeats}
        for number in sorted([*of_number, *self._ledger.board.refused]):
            if number in of_number:
                self._add(of_number[number], number)
            else:
                self.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
                self._count = number + 1
        for row in rows.values():
            self._learn(row)

    def _add(self, row: Row, number: int) -> None:
        """A trial of the study that runs, with the row's point; its values are learned later."""
        params, kinds = to_params(self._search, row.point), distributions(self._search)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=params, distributions={name: kinds[name] for name in params}
            )
        )
        frozen = self.study.get_trials(deepcopy=False)[-1]
        assert frozen.number == number
        self._count = number + 1
        trial = optuna.Trial(self.study, frozen._trial_id)
        self._describe(trial, row)
        self._asked.setdefault(row.trial_id, []).append(trial)

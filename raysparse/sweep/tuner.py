"""Run a sweep, or resume one: Tune walks each stage, the journal remembers it.

A resumed sweep does not use `Tuner.restore`: Tune's snapshots are periodic (what came after the last one is lost), do
not hold the scheduler, and are pickles. Each stage is a new Tuner over what the journal says is left: open trials go on
from their checkpoints, the rungs and the study are rebuilt.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from raysparse import space
from raysparse.config import parse
from raysparse.errors import UsageError
from raysparse.files import write_text
from raysparse.results import Facts
from raysparse.space import Sweep
from raysparse.sweep import changes, control, folder, leaving, preparing
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.journal import Event, event
from raysparse.sweep.leaving import Pause
from raysparse.sweep.limits import Guard, Limits
from raysparse.sweep.patience import passing, patiently
from raysparse.sweep.signals import caught
from raysparse.sweep.storage import Budget

OnEvent = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a sweep ended."""

    results: Path
    board: Board
    interrupted: bool  # by Ctrl-C, SIGTERM or a limit; `resume` goes on
    limit: str | None = None  # the limit that was reached, in words

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.board.rows.values() if row.state == "FAILED"]


def run(
    sweep: Sweep,
    results: Path,
    *,
    command: str,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    on_event: OnEvent | None = None,
    **ray: Any,
) -> Summary:
    """Run all stages of a sweep in a new results folder. Blocks; `on_event` is called in this thread.

    limits: what ends it before its end, as an interrupt does. ray: address, num_cpus, temp_dir as `cluster.ray_for`.
    Ctrl-C or SIGTERM once: the trials save themselves, then it returns with `interrupted`; twice: ends the process at
    once, which `resume` survives as well.
    UsageError where the folder is taken, a trial cannot start, or resources are missing: then nothing was trained.
    """
    results, sweep = results.absolute(), preparing.with_whole_paths(sweep)
    folder.check_new(results, sweep)
    preparing.prepare(sweep, **ray)
    with folder.locked(results):
        folder.refuse_if_taken(results, sweep)
        return _drive(sweep, results, command, limits, on_event, ray, new=True)


def resume(
    results: Path,
    *,
    space_file: Sweep | None = None,
    accept_changes: bool = False,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    on_event: OnEvent | None = None,
    **ray: Any,
) -> Summary:
    """Go on with a sweep that was interrupted or killed, as `run`; one that is finished is returned as it is.

    space_file: the sweep to go on with, where its file has changed; None: as it began. Data that it does not place lies
    where it did. UsageError with the differences where that, the code or a version is another, unless `accept_changes`:
    then they are recorded, once all is there that the sweep needs.
    """
    results = results.absolute()
    sweep, command = folder.load(results)
    with folder.locked(results):
        wanted = preparing.with_whole_paths(preparing.placed_as(sweep, space_file)) if space_file else None
        found = changes.differences(results, wanted)
        board = Board.load(results)
        if board.finished and not (found and wanted):
            return Summary(results, board, interrupted=False)
        changes.check_planned(results, board)
        if found:
            if not accept_changes:
                changes.refuse(results, found)
            same = wanted is None or wanted == sweep
            sweep = wanted or sweep
            changes.check(results, sweep)
        preparing.prepare(sweep, choices=wanted is not None, **ray)
        if found:
            changes.accept(results, sweep)
            with closing(Ledger(results, on_event)) as ledger:
                stage = ledger.board.stage if same else None  # other versions alone have nothing more to search
                ledger.add(event("accepted", stage=stage, reason="; ".join(found)))
        return _drive(sweep, results, command, limits, on_event, ray)


def _drive(
    sweep: Sweep,
    results: Path,
    command: str,
    limits: Limits,
    on_event: OnEvent | None,
    ray: dict[str, Any],
    new: bool = False,
) -> Summary:
    from raysparse.sweep.cluster import concurrency, ray_for

    with caught() as signals, ray_for(results, sweep.resources, **ray), _in_words(results):
        signals.catch()  # again: Ray's start puts a SIGTERM handler of its own in place
        at_a_time = concurrency(sweep.resources)
        leaving.forget(results)
        if new:  # now that it can start
            folder.create(results, sweep, command)
        with closing(Ledger(results, on_event)) as ledger:
            budget = Budget(results, ledger, sweep)
            more = functools.partial(_more, sweep, ledger.board)
            guard = Guard(limits, sweep.resources, results, ledger.board, budget.make_room, more)

            def interrupted() -> bool:
                budget.keep()
                return signals.came() or guard.reached() is not None

            for stage in ("search", *(["confirm"] if sweep.confirm else [])):
                if not interrupted():
                    _stage(stage, sweep, results, command, ledger, at_a_time, interrupted, guard)
            if interrupted():
                go_on = f"go on with: raysparse resume {shlex.quote(str(results))}"
                reason = "; ".join(filter(None, [guard.reached(), go_on]))
                ledger.add(event("interrupted", stage=ledger.board.stage, reason=reason))
            else:
                ledger.add(event("finished"))
            summary = Summary(results, ledger.board, interrupted(), guard.reached())
    leaving.forget(results)  # its processes have ended with Ray
    return summary


def _more(sweep: Sweep, board: Board) -> bool:
    """Whether trials are to come: planned ones, of which a search that is at a limit has the next, or a whole stage."""
    return any(row.open for row in board.rows.values()) or (sweep.confirm is not None and board.stage != "confirm")


def _stage(
    stage: str,
    sweep: Sweep,
    results: Path,
    command: str,
    ledger: Ledger,
    at_a_time: int,
    interrupted: Callable[[], bool],
    guard: Guard,
) -> None:
    """One stage to its end, or until interrupted."""
    from raysparse.sweep.cluster import Shortage
    from raysparse.sweep.event_files import EventFiles
    from raysparse.sweep.gauges import Gauges
    from raysparse.sweep.records import Records
    from raysparse.sweep.scheduler import Rungs

    _plan(stage, sweep, ledger)
    facts = functools.cache(functools.partial(_facts, sweep, command, ledger))

    def asked() -> None:
        why = guard.reached() or "interrupted"
        reason = f"{why}: the trials that run save themselves, for a minute at most; Ctrl-C ends without that"
        ledger.add(event("note", stage=stage, reason=reason))

    pause = Pause(results, interrupted, lambda: _running(ledger), asked)
    callback = Records(ledger, results, lambda row: facts(row.trial_id), pause, Shortage(sweep.resources))
    callback.repair()
    if ledger.board.stage == "confirm" and not any(row.open for row in ledger.board.of_stage(stage)):
        return  # a search asked again might find new trials, and the confirm stage a second winner
    total_steps = space.parsed_base(sweep).train.steps
    scheduler = Rungs(
        ledger,
        stage,
        total_steps,
        sweep.asha if stage == "search" else None,
        functools.partial(control.stop_asked_by, results),
    )
    callbacks = [callback, Gauges(ledger, sweep, results), EventFiles(ledger, results)]
    searcher = _searcher(stage, sweep, results, ledger)
    searcher.may_start = guard.may_start
    tuner = _tuner(sweep, results, scheduler, searcher, callbacks, at_a_time)
    try:
        tuner.fit()
    except KeyboardInterrupt:
        if not interrupted():
            raise
    callback.repair()  # trials that failed before they were handed out


@contextmanager
def _in_words(results: Path) -> Iterator[None]:
    """What a sweep ends at, storage that failed for longer than the driver waits or a lost Ray, with what to do.

    The journal is whole up to there.
    """
    from ray.tune.error import TuneError

    from raysparse.sweep.cluster import RayLost

    go_on = f"go on with: raysparse resume {shlex.quote(str(results))}"
    try:
        yield
    except RayLost as error:
        raise UsageError(f"{error}; {go_on}") from error
    except (OSError, TuneError) as error:
        failed = error if isinstance(error, OSError) else error.__context__  # Tune has what a callback raised as text
        if not passing(failed):
            raise
        raise UsageError(
            f"{results} cannot be written: {failed}; free some space or bring the storage back, then {go_on}"
        ) from error


def _running(ledger: Ledger) -> list[str]:
    return [row.trial_id for row in ledger.board.rows.values() if row.state == "RUNNING"]


def _plan(stage: str, sweep: Sweep, ledger: Ledger) -> None:
    from raysparse.sweep import confirm
    from raysparse.sweep.search import planned

    board = ledger.board
    # A search that had ended when the sweep was killed in its confirm stage does not begin again.
    over = (stage, board.stage) == ("search", "confirm") and not any(row.open for row in board.of_stage(stage))
    if board.stage != stage and not over:
        ledger.add(event("stage", stage=stage))
    if stage == "confirm":
        confirm.plan(sweep, ledger)
    elif sweep.grid is not None:
        for point in space.grid_points(sweep):
            trial = space.trial(sweep, point)
            if trial.trial_id not in ledger.board.rows:
                ledger.add(planned(trial, point, stage))


def _searcher(stage: str, sweep: Sweep, results: Path, ledger: Ledger) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from raysparse.sweep.search import Listed, Suggested
    from raysparse.train import setup

    tune_config = functools.partial(_tune_config, sweep, results)
    if stage == "confirm" or sweep.search is None:
        return Listed(ledger, stage, tune_config, sweep.asha if stage == "search" else None)
    path = results / "optuna" / "study.log"
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.iterdir():  # an older driver's; and the lock that it held when it was killed
        old.unlink()
    return Suggested(sweep, ledger, tune_config, JournalStorage(JournalFileBackend(str(path))), setup.check)


def _tune_config(sweep: Sweep, results: Path, row: Row) -> dict[str, Any]:
    """What a trial's process is told; the trial itself lies in a file, so that Tune's logs repeat only the point."""
    path, text = results / "trials" / row.trial_id / "trial.json", json.dumps(row.config, indent=2) + "\n"
    patiently(lambda: write_text(path, text), f"settings of {row.trial_id}", needed=True)
    resources = sweep.resources
    return {
        "trial_id": row.trial_id,
        "results": str(results),
        "workers": resources.workers,
        "cpus_per_worker": resources.cpus_per_worker,
        "gpus_per_worker": resources.gpus_per_worker,
        "hung_after_s": resources.hung_after_s,
        **row.point,
    }


def _facts(sweep: Sweep, command: str, ledger: Ledger, trial_id: str) -> Facts:
    from raysparse.train import setup

    row = ledger.board.rows[trial_id]
    trial = parse(row.config, trial_id)
    return setup.facts(trial, sweep=sweep.name, stage=row.stage, world_size=sweep.resources.workers, command=command)


def _tuner(sweep: Sweep, results: Path, scheduler: Any, searcher: Any, callbacks: list[Any], at_a_time: int) -> Any:
    from ray import tune

    from raysparse.sweep import trainable, worker

    resources = sweep.resources
    if resources.workers == 1:
        function: Callable[[dict[str, Any]], None] = trainable.train
        per_trial = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    else:
        function, per_trial = worker.train, dict(worker.DRIVER)
    bundle = {name: value for name, value in per_trial.items() if value}
    return tune.Tuner(
        tune.with_resources(function, tune.PlacementGroupFactory([bundle])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # until the searcher has no more
            max_concurrent_trials=at_a_time,
            reuse_actors=resources.workers == 1 and not _compiles(sweep),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(results),
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=-1),  # of lost processes; leaving.count_start ends it
            verbose=0,
        ),
    )


def _compiles(sweep: Sweep) -> bool:
    """Whether any trial may be one that is compiled; such trials have a process each.

    Tune runs each trial in a thread of its own. Before PyTorch 2.14 CUDA graphs of compiled networks can be recorded
    in the first of them only (an AssertionError elsewhere), and all trials of a process share the eight times that a
    network may be compiled anew, after which it runs uncompiled.
    """
    return space.parsed_base(sweep).train.compile or any("train.compile" in axes for axes in sweep.axes.values())


def _name(trial: Any) -> str:
    return str(trial.config["trial_id"])

"""`raysparse sweep, resume`: the main job."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from raysparse import space
from raysparse.cli.app import (
    Address,
    AsJson,
    Cpus,
    Data,
    SweepChanges,
    app,
    command_line,
    load_sweep,
    sweep_changes,
)
from raysparse.errors import UsageError, usage_error_from
from raysparse.files import size_bytes

if TYPE_CHECKING:
    from raysparse.sweep.limits import Limits

MaxTrials = Annotated[int | None, typer.Option(min=1, help="End after so many trials; resumable, as all limits.")]
MaxHours = Annotated[float | None, typer.Option(help="End this run after so many hours.")]
MaxGpuHours = Annotated[float | None, typer.Option(help="End when the sweep has used so many GPU hours.")]
MaxDisk = Annotated[str | None, typer.Option(metavar="SIZE", help="End when the results have this size, e.g. 500GB.")]


@app.command()
def sweep(
    path: Annotated[Path, typer.Argument(help="A sweep file, such as tune_spaces/quickstart.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Results folder; default results/NAME.")] = None,
    data: Data = None,
    changes: SweepChanges = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print trials, FLOPs and hours; start nothing.")
    ] = False,
    max_trials: MaxTrials = None,
    max_hours: MaxHours = None,
    max_gpu_hours: MaxGpuHours = None,
    max_disk: MaxDisk = None,
    cpus: Cpus = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Search S, p and ΔTe over dense and sparse methods, confirm the best on fresh seeds, write a report."""
    loaded = load_sweep(path, changes, data)
    if dry_run:
        from raysparse.terminal import print_plan
        from raysparse.train import plan

        planned = plan.plan(loaded, cpus=cpus)
        typer.echo(json.dumps(planned)) if as_json else print_plan(loaded, planned)
        return
    from raysparse.sweep import folder, preparing, tuner
    from raysparse.terminal import progress

    results = output or Path("results") / loaded.name
    limits = _limits(max_trials, max_hours, max_gpu_hours, max_disk)
    folder.check_new(results.absolute(), preparing.with_whole_paths(loaded))
    with progress(f"preparing {space.parsed_base(loaded).data.name}") as advance:
        preparing.prepare(loaded, progress=advance, num_cpus=cpus, address=address)
    start = partial(tuner.run, loaded, results, command=command_line(), limits=limits, num_cpus=cpus, address=address)
    _show(results, loaded, start, as_json)


@app.command()
def resume(
    results: Annotated[Path, typer.Argument(help="The folder of an interrupted sweep.")],
    space_file: Annotated[
        Path | None, typer.Option("--space", help="The sweep file, where it has changed: more trials, other rungs.")
    ] = None,
    data: Data = None,
    changes: SweepChanges = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with another file, code or version; recorded.")
    ] = False,
    max_trials: MaxTrials = None,
    max_hours: MaxHours = None,
    max_gpu_hours: MaxGpuHours = None,
    max_disk: MaxDisk = None,
    cpus: Cpus = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a sweep that was interrupted or killed.

    --set and --data change the file of --space, without one the sweep as it began. Data is looked for where it was.
    """
    from raysparse.sweep import folder, tuner

    overrides = sweep_changes(changes, data)
    sweep_file = None
    if space_file is not None:
        sweep_file = space.load(space_file, overrides)
    elif overrides:
        begun, _ = folder.load(results)
        sweep_file = space.changed(begun.model_dump(mode="json"), overrides, str(results / "sweep.json"))
    start = partial(
        tuner.resume,
        results,
        space_file=sweep_file,
        accept_changes=accept_changes,
        limits=_limits(max_trials, max_hours, max_gpu_hours, max_disk),
        num_cpus=cpus,
        address=address,
    )
    _show(results, sweep_file or folder.load(results)[0], start, as_json)


def _limits(trials: int | None, hours: float | None, gpu_hours: float | None, disk: str | None) -> Limits:
    from raysparse.sweep.limits import Limits

    given = {"max_trials": trials, "max_hours": hours, "max_gpu_hours": gpu_hours}
    try:
        return Limits(**given, max_disk_bytes=size_bytes(disk) if disk else None)
    except ValidationError as error:
        raise usage_error_from(error, "limits", Limits) from None


def _show(results: Path, sweep_file: space.Sweep, start: Callable[..., Any], as_json: bool) -> None:
    """Drive a sweep with its table on the screen, then write its report; its path is all that goes to stdout."""
    from raysparse.screen import SweepDisplay
    from raysparse.sweep.board import Board

    board = Board.load(results)
    board.settle()  # until the driver begins nothing runs
    with SweepDisplay(board, space.trial_count(sweep_file)) as display:
        summary = start(on_event=display.on_event)
    if summary.interrupted:
        why = summary.limit or "interrupted"
        typer.echo(f"{why}; go on with: raysparse resume {shlex.quote(str(results))}", err=True)
        raise typer.Exit(0 if summary.limit else 130)
    from analysis import report

    try:
        page = report.write(results)
    except OSError as error:
        again = f"python -m analysis {shlex.quote(str(results))}"
        raise UsageError(f"the sweep is finished; its report cannot be written: {error}; try again: {again}") from error
    for row in summary.failed:
        typer.echo(f"failed: {row.trial_id}: {row.reason}", err=True)
    if as_json:
        counts = {"results": str(results), "report": str(page), "trials": summary.board.counts()}
        typer.echo(json.dumps(counts))
    else:
        typer.echo(page)
    if len(summary.failed) == len(summary.board.rows):
        raise typer.Exit(1)

"""`raysparse ls, show, diff, stop, retry`: sweeps and trials, from any machine that sees their folders."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from raysparse.cli.app import AsJson, app
from raysparse.errors import UsageError

Results = Annotated[Path, typer.Argument(metavar="RESULTS", help="The results folder of a sweep.")]
Trial = Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's id, or enough of its beginning.")]


@app.command()
def ls(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Results folders, or folders of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the sweeps below a folder (default: results), or the trials of one sweep."""
    from raysparse.pages import print_sweeps, print_trials
    from raysparse.sweep import views

    places = folders or [Path("results") if Path("results").is_dir() else Path()]
    found = list(dict.fromkeys(path for place in places for path in views.find(place)))
    if found == places and len(found) == 1:
        view = views.load(found[0])
        sweep, trials = views.sweep_facts(view), [views.trial_facts(row) for row in view.board.rows.values()]
        if as_json:
            typer.echo(json.dumps(sweep | {"table": trials}))
        else:
            print_trials(sweep, list(view.board.rows.values()))
        return
    lines = []
    for path in found:
        try:
            lines.append(views.sweep_facts(views.load(path)))
        except UsageError as error:  # one that is damaged hides no other
            lines.append({"results": str(path), "name": path.name, "state": "damaged", "reason": str(error)})
    if as_json:
        typer.echo(json.dumps(lines))
    else:
        print_sweeps(lines)


@app.command()
def show(results: Results, trial: Trial, as_json: AsJson = False) -> None:
    """Show one trial: settings, course of FID, why it ended, its last log lines, how to get it again."""
    from raysparse.pages import print_trial
    from raysparse.sweep import views

    view = views.load(results)
    page = views.trial_page(view, views.pick(view.board, trial))
    typer.echo(json.dumps(page)) if as_json else print_trial(page)


@app.command()
def diff(results: Results, a: Trial, b: Trial, as_json: AsJson = False) -> None:
    """Compare two trials: settings that differ, FIDs side by side where they are comparable."""
    from raysparse.pages import print_difference
    from raysparse.sweep import views

    view = views.load(results)
    found = views.difference(view, views.pick(view.board, a), views.pick(view.board, b))
    typer.echo(json.dumps(found)) if as_json else print_difference(found)


@app.command()
def stop(results: Results, trial: Trial, as_json: AsJson = False) -> None:
    """End one trial at its next report; it is kept as STOPPED by you, and the sweep goes on without it."""
    from raysparse.sweep import control, folder, views

    folder.load(results)
    row = views.pick(views.load(results).board, trial)
    said = control.stop(results, row.trial_id)
    typer.echo(json.dumps({"trial_id": row.trial_id, "said": said}) if as_json else f"{row.trial_id}: {said}")


@app.command()
def retry(
    results: Results,
    trials: Annotated[list[str] | None, typer.Argument(metavar="[TRIAL]...", help="Trials, by id.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All trials that failed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Open failed trials again, or ones that you stopped; `raysparse resume` then runs them from where they were."""
    from raysparse.sweep import control, folder, views

    folder.load(results)
    if bool(trials) == failed:
        raise UsageError("say which trials: either --failed or their ids, as `raysparse ls` shows them")
    board = views.load(results).board
    rows = [views.pick(board, name) for name in trials or []]
    rows += [row for row in board.rows.values() if failed and row.state == "FAILED"]
    names = list(dict.fromkeys(row.trial_id for row in rows))
    if names:
        control.retry(results, names)
    go_on = f"raysparse resume {shlex.quote(str(results))}"
    if as_json:
        typer.echo(json.dumps({"reopened": names, "what_to_do": go_on if names else None}))
        return
    for name in names:
        typer.echo(f"{name}: open again")
    typer.echo(f"run them with: {go_on}" if names else "no trial of this sweep has failed")

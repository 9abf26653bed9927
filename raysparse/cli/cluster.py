"""`raysparse submit, doctor`: a cluster of machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysparse.cli.app import (
    AsJson,
    SweepChanges,
    app,
    load_sweep,
)
from raysparse.cli.sweep import MaxDisk, MaxGpuHours, MaxHours, MaxTrials
from raysparse.errors import UsageError

if TYPE_CHECKING:
    from raysparse.sweep import submit as jobs

Token = Annotated[
    Path | None,
    typer.Option("--token", help="The cluster's token; default $RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."),
]


@app.command()
def submit(
    path: Annotated[
        Path | None, typer.Argument(help="A sweep file; with --resume only where it has changed: more trials.")
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as the tunnel's.")
    ] = "http://127.0.0.1:8265",
    output: Annotated[
        str | None,
        typer.Option(help="Results folder as the cluster sees it, on shared storage; /mnt/raysparse/results/NAME."),
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the sweep in this folder of the cluster.")] = None,
    token: Token = None,
    requirements: Annotated[
        Path | None, typer.Option(help="A requirements.txt for nodes whose image lacks what raysparse needs.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show what the job prints until it has ended.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="The raw data, as the cluster sees it.")] = None,
    changes: SweepChanges = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume with another file, code or version; recorded.")
    ] = False,
    max_trials: MaxTrials = None,
    max_hours: MaxHours = None,
    max_gpu_hours: MaxGpuHours = None,
    max_disk: MaxDisk = None,
    as_json: AsJson = False,
) -> None:
    """Run a sweep on a cluster: hand it over as a Ray job, which goes on when this machine goes away.

    Whoever has the cluster's token can run any program on it: that is what a job is. Keep its file to yourself (0600)
    and reach the dashboard through `ray dashboard cluster.yaml`, a tunnel.
    """
    from raysparse.sweep import submit as jobs

    if path is None and resume is None:
        raise UsageError("give a sweep file, or --resume DIR to go on with a sweep of the cluster")
    if resume is not None and output is not None:
        raise UsageError("--resume DIR names the results folder already: --output does not go with it")
    if resume is None and accept_changes:
        raise UsageError("--accept-changes goes with --resume: a new sweep has nothing that could have changed")
    if jobs.in_the_clear(address):
        typer.echo(
            f"warning: the token crosses the network unencrypted on its way to {address}, and whoever reads it can run "
            "any program there; use the tunnel of `ray dashboard cluster.yaml`, or https",
            err=True,
        )
    data_set = [f"base.data.source={json.dumps(data)}"] if data else []
    sweep = load_sweep(path, [*(changes or []), *data_set], None) if path is not None else None
    limits = {"trials": max_trials, "hours": max_hours, "gpu-hours": max_gpu_hours, "disk": max_disk}
    options = [f"--max-{name}={value}" for name, value in limits.items() if value is not None]
    if resume is not None:
        if sweep is None:  # then they change the sweep that lies there
            options += [f"--set={change}" for change in [*(changes or []), *data_set]]
        options += ["--accept-changes"] * accept_changes
        sent = jobs.submit_resume(resume, address, sweep=sweep, options=options, token=token, requirements=requirements)
    elif sweep is not None:
        sent = jobs.submit_sweep(sweep, address, output=output, options=options, token=token, requirements=requirements)
    if as_json:
        facts = {"job": sent.job_id, "address": sent.address, "results": sent.results}
        typer.echo(json.dumps(facts | {"files": sent.files, "bytes": sent.size_bytes}))
    else:
        typer.echo(sent.job_id)
    size = f"{sent.files} files, {sent.size_bytes / 2**20:.1f} MiB"
    typer.echo(f"submitted to {address}: {size}; results on the cluster in {sent.results}", err=True)
    for purpose, command in jobs.next_steps(sent).items():
        typer.echo(f"  {purpose + ':':7} {command}", err=True)
    if follow:
        _follow(sent)


def _follow(sent: jobs.Submission) -> None:
    """Show a job until its end. Exit code 1 where it failed, 130 where it was stopped or is left to itself."""
    from raysparse.sweep import submit as jobs

    try:
        state = jobs.follow(sent, lambda text: typer.echo(text, err=True, nl=False))
    except KeyboardInterrupt:
        typer.echo(
            f"\nno longer followed; the job goes on; to stop it: {sent.ray_command('stop', sent.job_id)}", err=True
        )
        raise typer.Exit(130) from None
    typer.echo(f"job {sent.job_id}: {state.lower()}", err=True)
    if state != "SUCCEEDED":
        raise typer.Exit(130 if state == "STOPPED" else 1)


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="A cluster: its dashboard (http://127.0.0.1:8265), or `auto` on one of its machines; default: none.",
        ),
    ] = None,
    storage: Annotated[str | None, typer.Option(help="The folder of results, as the cluster sees it.")] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or every node of a cluster, and say for each finding what to do; exit code 1 if one fails.

    Versions, GPUs, compiler, token and its file, bind addresses, storage written and read on every node, disks, clocks.
    """
    from raysparse.sweep import doctor as ward
    from raysparse.sweep.verdicts import worst

    found = ward.diagnose(address, storage, token)
    if as_json:
        typer.echo(ward.as_json(found))
    else:
        for check in found:
            typer.secho(f"{check.status:5}", fg=_COLOURS[check.status], bold=check.status != "ok", nl=False)
            typer.echo(f" {check.name}: {check.found}")
            if check.todo:
                typer.echo(f"      do: {check.todo}")
    if worst(found) == "fail":
        raise typer.Exit(1)


_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}

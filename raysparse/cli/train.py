"""`raysparse train`: one trial without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raysparse.cli.app import (
    AsJson,
    Changes,
    Data,
    app,
    command_line,
    load_trial,
)


@app.command()
def train(
    path: Annotated[Path | None, typer.Argument(help="A trial file, or a sweep file for its base trial.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of records and checkpoints.")] = Path("results/train"),
    workers: Annotated[int, typer.Option(min=1, help="DDP processes.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    data: Data = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Train one trial; the same command continues it where it stopped."""
    from raysparse.terminal import report_line
    from raysparse.train import run

    trial = load_trial(path, changes, data)
    outcome = run.train(
        trial,
        output,
        workers=workers,
        device=device,
        command=command_line(),
        on_report=lambda report: typer.echo(report_line(trial, report), err=True),
    )
    record = output / "records" / f"{trial.trial_id}.parquet"
    if as_json:
        from raysparse.results import read_trial

        typer.echo(
            json.dumps(read_trial(record).drop_columns(["samples_png", "mask_sample", "config"]).to_pylist()[-1])
        )
    else:
        typer.echo(record)
    if outcome.state == "RUNNING":
        typer.echo("interrupted; a checkpoint was saved: the same command goes on", err=True)
        raise typer.Exit(130)
    if outcome.state == "FAILED":
        typer.echo(f"failed: {outcome.state_reason}", err=True)
        raise typer.Exit(1)

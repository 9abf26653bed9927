"""`raysparse prepare`: a data set, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raysparse import config, plugins
from raysparse.cli.app import (
    Address,
    AsJson,
    Changes,
    Cpus,
    app,
    load_trial,
    parse_changes,
)
from raysparse.config import TrialConfig


@app.command()
def prepare(
    name: Annotated[
        str, typer.Argument(help="A data set, or a trial or sweep file: then exactly what its trials will ask for.")
    ],
    path: Annotated[
        Path | None, typer.Option("--path", "--data", help="The raw data: a file or a folder, instead of a download.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Where prepared data goes; default $RAYSPARSE_DATA or a cache.")
    ] = None,
    first_stage: Annotated[
        str | None, typer.Option(help="Encode pictures with these weights: a folder, a Hub id or a model.ckpt.")
    ] = None,
    cpus: Cpus = None,
    gpus_per_task: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a task that encodes; default 1 where there is a GPU.")
    ] = None,
    address: Address = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Bring a data set into the form that trials read, once; `--set spacing=0.1` sets one of its options.

    Pictures are read and encoded by one Ray task per shard, or with `--cpus 1` in this process. What is killed goes on
    where it stopped, by the same command.
    """
    from raysparse.data import prepared
    from raysparse.sweep import encode
    from raysparse.terminal import print_left_out, progress

    trial = _to_prepare(name, changes, path, root, first_stage)
    try:
        with progress(f"preparing {trial.data.name}") as advance:
            folder = encode.prepare(trial, cpus=cpus, gpus_per_task=gpus_per_task, address=address, progress=advance)
    except KeyboardInterrupt:
        typer.echo("interrupted; what is finished is kept, the same command goes on", err=True)
        raise typer.Exit(130) from None
    for split in prepared.SPLITS:  # what was there already may be damaged: say so now, not when a trial begins
        prepared.open_split(folder, split)
    facts = encode.facts(folder)
    print_left_out(facts)
    typer.echo(json.dumps(facts) if as_json else folder)


def _to_prepare(
    name: str, changes: list[str] | None, path: Path | None, root: Path | None, first_stage: str | None
) -> TrialConfig:
    """A trial with the data and the first stage that are meant; of a data set's name, `changes` are its options."""
    if Path(name).suffix in (".yaml", ".yml"):
        content = load_trial(Path(name), changes, path).model_dump(mode="json")
    else:
        plugins.load("datasets", name)  # a wrong name is said before any other mistake
        content = {"data": {"name": name, "options": parse_changes(changes), "source": str(path) if path else None}}
    if root is not None:
        content["data"]["root"] = str(root)
    if first_stage is not None:
        content = config.with_value(content, "first_stage.weights", first_stage)
    return config.parse(content, name)

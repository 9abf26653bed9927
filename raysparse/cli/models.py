"""`raysparse sample, evaluate, export, import`: what trained models are good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from raysparse import files
from raysparse.cli.app import (
    AsJson,
    Changes,
    Data,
    app,
    command_line,
    parse_changes,
)
from raysparse.config import MOST_SAMPLES, MOST_THREADS

Runtime = Annotated[
    str | None,
    typer.Option(
        help="dense: PyTorch. sparse: kernels that skip zero weights, on the CPU. auto: those where they can run. "
        "Default the trial's."
    ),
]

Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_THREADS, help="CPU threads, of each worker; default all cores, shared by the workers."
    ),
]


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a trial's folder of them, or an imported folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the pictures; new or empty.")],
    count: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="How many.")] = 16,
    label: Annotated[list[int] | None, typer.Option(help="A class of a conditional model; repeatable.")] = None,
    ddim_steps: Annotated[int | None, typer.Option(min=1, help="DDIM steps; default the trial's.")] = None,
    eta: Annotated[float | None, typer.Option(help="0 is deterministic, 1 as noisy as DDPM.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise; default the trial's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    threads: Threads = None,
    runtime: Runtime = None,
    first_stage: Annotated[str | None, typer.Option(help="The first stage's weights, where they have moved.")] = None,
    data: Data = None,
    changes: Changes = None,
) -> None:
    """Draw samples from a trained model and write them as PNG, with all of them on one sheet."""
    import torch

    from raysparse.terminal import progress
    from raysparse.train import draw, ranks

    asked = {"ddim_steps": ddim_steps, "eta": eta, "guidance": guidance, "runtime": runtime}
    overrides = {f"evaluate.{name}": value for name, value in asked.items() if value is not None}
    overrides |= _places(data, first_stage) | parse_changes(changes)
    images = draw.draw(
        checkpoint, count, changes=overrides, seed=seed, labels=label, device=ranks.checked_device(device, 1)
    )
    if threads is not None:
        torch.set_num_threads(threads)
    with progress(f"drawing {count} samples") as advance:
        sheet = draw.write(images, output, lambda done: advance(done, count))
    typer.echo(sheet)


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoints, or results folders: their trials at the last step.")
    ],
    ddim_steps: Annotated[
        list[int] | None, typer.Option(min=1, help="DDIM steps; repeat it for a study: 50, 100, 150, 200.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the samples.")] = 1,
    threads: Threads = None,
    runtime: Runtime = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    pictures: Annotated[Path | None, typer.Option(help="Folder for a sheet of samples of each.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure again what was measured before.")] = False,
    first_stage: Annotated[str | None, typer.Option(help="The first stage's weights, where they have moved.")] = None,
    data: Data = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Measure FID and KID of trained models again, with other steps, eta or extractor; kept in RESULTS/evaluations."""
    from raysparse.terminal import print_evaluations, progress
    from raysparse.train import reevaluate, restored

    overrides = _places(data, first_stage) | parse_changes(changes)
    if pictures is not None:  # now, not after everything was measured
        files.check_writable(pictures)
    if runtime is not None:
        overrides["evaluate.runtime"] = runtime
    variants = [overrides | {"evaluate.ddim_steps": steps} for steps in dict.fromkeys(ddim_steps or [])] or [overrides]
    meant = [restored.to_evaluate(path) for path in checkpoints]
    found = list(dict.fromkeys(folder for those, _ in meant for folder in those))
    if left := {folder.parent for _, others in meant for folder in others if folder not in found}:
        typer.echo(
            f"left out, not at their last step: {len(left)} of {len(left) + len(found)} trials; to evaluate one as it "
            f"is, give its folder, such as {min(left)}",
            err=True,
        )
    rows: list[reevaluate.Row] = []
    with progress("evaluating") as advance:

        def note(row: reevaluate.Row) -> None:
            rows.append(row)
            advance(len(rows), len(found) * len(variants))

        for folder in found:
            reevaluate.evaluate(
                folder,
                variants,
                workers=workers,
                threads=threads,
                device=device,
                again=again,
                command=command_line(),
                on_row=note,
            )
    if pictures is not None:
        reevaluate.write_pictures(rows, pictures)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows]))
    else:
        print_evaluations(rows)
    if len(rows) < len(found) * len(variants):
        typer.echo("interrupted; what was measured is kept, the same command goes on", err=True)
        raise typer.Exit(130)


def _places(data: Path | None, first_stage: str | None) -> dict[str, Any]:
    """Where things lie now, as changes of a trial."""
    places = {"data.source": str(data) if data else None, "first_stage.weights": first_stage}
    return {name: value for name, value in places.items() if value is not None}


@app.command("export")
def export_(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a trial's folder of them, or an imported folder.")],
    to: Annotated[Path, typer.Option(help="A new folder; plain diffusers loads it.")],
    first_stage: Annotated[str | None, typer.Option(help="The first stage's weights, where they have moved.")] = None,
) -> None:
    """Write a trained model for others: diffusers' layout with exact zeros, masks as bits, a model card."""
    from raysparse.train import export

    typer.echo(export.export(checkpoint, to, first_stage=first_stage))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A folder that `raysparse export` wrote.")],
    to: Annotated[Path, typer.Option(help="A new folder, for raysparse sample, evaluate and export.")],
) -> None:
    """Get an exported model back: its masks and weights, bit for bit, after checking every hash."""
    from raysparse.train import export

    typer.echo(export.import_(folder, to))

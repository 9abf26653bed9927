"""The commands. Results go to stdout, progress to stderr; torch and ray are imported inside the commands."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import raysparse
from raysparse import config, plugins, space
from raysparse.config import TrialConfig
from raysparse.errors import UsageError

app = typer.Typer(
    help="Sparse-to-sparse training of diffusion models, swept on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. train.steps=100; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs to use on this machine; default all.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; default $RAY_ADDRESS, else a local Ray.")]
Data = Annotated[Path | None, typer.Option("--data", help="The raw data: a file or a folder, instead of a download.")]


def main() -> None:
    """The `raysparse` command: exit code 2 for the user's mistakes, without a traceback."""
    try:
        app()
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def command_line() -> str:
    """What to type to get the same again."""
    return shlex.join(["raysparse", *sys.argv[1:]])


def parse_changes(changes: list[str] | None) -> dict[str, Any]:
    """`["train.steps=5"]` -> `{"train.steps": 5}`; values are YAML. UsageError for one without `=`."""
    parsed = {}
    for change in changes or []:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise UsageError(f"--set takes KEY=VALUE such as train.steps=100, got {change!r}")
        try:
            parsed[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {name}: {text!r} is not a YAML value") from error
    return parsed


def load_sweep(path: Path, changes: list[str] | None, data: Path | None) -> space.Sweep:
    """The sweep file with the command line's changes."""
    overrides = parse_changes(changes)
    if data is not None:
        overrides["base.data.source"] = str(data)
    return space.load(path, overrides)


def load_trial(path: Path | None, changes: list[str] | None, data: Path | None) -> TrialConfig:
    """A trial from a trial file, from the base of a sweep file, or from the defaults."""
    overrides = parse_changes(changes)
    content: Mapping[str, Any] = space.load_yaml(path) if path else {}
    if path and ("grid" in content or "search" in content):
        method = overrides.get("sparse.method", "dense")
        plugins.load("methods", str(method))
        content = space.base_data(space.load(path), method)
    for name, value in overrides.items():
        content = config.with_value(content, name, value)
    if data is not None:
        content = config.with_value(content, "data.source", str(data))
    return config.parse(content, str(path or "trial"))


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show:
        typer.echo(raysparse.__version__)
        raise typer.Exit


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
    from raysparse.sweep import encode
    from raysparse.terminal import print_damaged, progress

    trial = _to_prepare(name, changes, path, root, first_stage)
    try:
        with progress(f"preparing {trial.data.name}") as advance:
            folder = encode.prepare(trial, cpus=cpus, gpus_per_task=gpus_per_task, address=address, progress=advance)
    except KeyboardInterrupt:
        typer.echo("interrupted; what is finished is kept, the same command goes on", err=True)
        raise typer.Exit(130) from None
    facts = encode.facts(folder)
    print_damaged(facts)
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

        typer.echo(json.dumps(read_trial(record).drop_columns(["samples_png", "config"]).to_pylist()[-1]))
    else:
        typer.echo(record)
    if outcome.state == "RUNNING":
        typer.echo("interrupted; a checkpoint was saved: the same command goes on", err=True)
        raise typer.Exit(130)
    if outcome.state == "FAILED":
        typer.echo(f"failed: {outcome.state_reason}", err=True)
        raise typer.Exit(1)


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a trial's folder of them, or an imported folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the pictures; new or empty.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 16,
    label: Annotated[list[int] | None, typer.Option(help="A class of a conditional model; repeatable.")] = None,
    ddim_steps: Annotated[int | None, typer.Option(min=1, help="DDIM steps; default the trial's.")] = None,
    eta: Annotated[float | None, typer.Option(help="0 is deterministic, 1 as noisy as DDPM.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise; default the trial's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    first_stage: Annotated[str | None, typer.Option(help="The first stage's weights, where they have moved.")] = None,
    data: Data = None,
    changes: Changes = None,
) -> None:
    """Draw samples from a trained model and write them as PNG, with all of them on one sheet."""
    from raysparse.terminal import progress
    from raysparse.train import draw, ranks

    asked = {"ddim_steps": ddim_steps, "eta": eta, "guidance": guidance}
    overrides = {f"evaluate.{name}": value for name, value in asked.items() if value is not None}
    overrides |= _places(data, first_stage) | parse_changes(changes)
    images = draw.draw(
        checkpoint, count, changes=overrides, seed=seed, labels=label, device=ranks.checked_device(device, 1)
    )
    with progress(f"drawing {count} samples") as advance:
        sheet = draw.write(images, output, lambda done: advance(done, count))
    typer.echo(sheet)


@app.command()
def evaluate(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints, or results folders: all their trials.")],
    ddim_steps: Annotated[
        list[int] | None, typer.Option(min=1, help="DDIM steps; repeat it for a study: 50, 100, 150, 200.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the samples.")] = 1,
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
    variants = [overrides | {"evaluate.ddim_steps": steps} for steps in dict.fromkeys(ddim_steps or [])] or [overrides]
    found = list(dict.fromkeys(folder for path in checkpoints for folder in restored.find(path)))
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


@app.command()
def cost(
    path: Annotated[Path | None, typer.Argument(help="A sweep or trial file.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name instead of a file.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="S; repeatable.")] = None,
    allocation: Annotated[str, typer.Option(help="uniform, er or erk.")] = "erk",
    points: Annotated[float | None, typer.Option(help="Mean points of a sketch; default: the data set's.")] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Parameters and FLOPs, dense and at each S, in the papers' convention and in the true one."""
    from raysparse.terminal import print_cost
    from raysparse.train.plan import cost_row

    if (path is None) == (model is None):
        raise UsageError("give a sweep file or --model NAME, one of the two")
    base = load_trial(path, [*(changes or []), *([f"model.name={model}"] if model else [])], None)
    content = base.model_dump(mode="json")
    sparsities = [0.0, *(sparsity or (_axis_sparsities(path) if path else []))]
    rows = []
    for value in dict.fromkeys(sparsities):
        sparse = {"method": "static", "sparsity": value, "allocation": allocation} if value else {"method": "dense"}
        rows.append(cost_row(config.parse({**content, "sparse": sparse}, "cost"), points))
    if as_json:
        typer.echo(json.dumps({"model": base.model.name, "options": base.model.options, "rows": rows}))
    else:
        print_cost(base, rows)


def _axis_sparsities(path: Path) -> list[float]:
    """Every S that a sweep file's axes name; a range gives its two ends."""
    content = space.load_yaml(path)
    if not {"grid", "search"} & set(content):
        return []
    values: set[float] = set()
    for axes in space.load(path).axes.values():
        axis = axes.get("sparsity", ())
        values |= {axis.low, axis.high} if isinstance(axis, space.Range) else set(axis)
    return sorted(values)


@app.command()
def sweep(
    path: Annotated[Path, typer.Argument(help="A sweep file, such as tune_spaces/quickstart.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Results folder; default results/NAME.")] = None,
    data: Data = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. base.train.steps=100; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print trials, FLOPs and hours; start nothing.")
    ] = False,
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
    from raysparse.sweep import tuner
    from raysparse.terminal import progress

    results = output or Path("results") / loaded.name
    with progress(f"preparing {space.parsed_base(loaded).data.name}") as advance:
        tuner.prepare(loaded, progress=advance, num_cpus=cpus, address=address)
    start = partial(tuner.run, loaded, results, command=command_line(), num_cpus=cpus, address=address)
    _show(results, loaded, start, as_json)


@app.command()
def resume(
    results: Annotated[Path, typer.Argument(help="The folder of an interrupted sweep.")],
    cpus: Cpus = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a sweep that was interrupted or killed."""
    from raysparse.sweep import folder, tuner

    sweep_file, _ = folder.load(results)
    _show(results, sweep_file, partial(tuner.resume, results, num_cpus=cpus, address=address), as_json)


def _show(results: Path, sweep_file: space.Sweep, start: Callable[..., Any], as_json: bool) -> None:
    """Drive a sweep with its table on the screen, then write its report; its path is all that goes to stdout."""
    from raysparse.sweep.board import Board
    from raysparse.terminal import SweepDisplay

    with SweepDisplay(Board.load(results), space.trial_count(sweep_file)) as display:
        summary = start(on_event=display.on_event)
    if summary.interrupted:
        typer.echo(f"interrupted; go on with: raysparse resume {results}", err=True)
        raise typer.Exit(130)
    from analysis import report

    page = report.write(results)
    for row in summary.failed:
        typer.echo(f"failed: {row.trial_id}: {row.reason}", err=True)
    if as_json:
        counts = {"results": str(results), "report": str(page), "trials": summary.board.counts()}
        typer.echo(json.dumps(counts))
    else:
        typer.echo(page)
    if len(summary.failed) == len(summary.board.rows):
        raise typer.Exit(1)


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

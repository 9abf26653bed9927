"""`raysparse plan`: the price of a sweep, before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raysparse.cli.app import AsJson, Cpus, Data, SweepChanges, app, load_sweep
from raysparse.errors import UsageError
from raysparse.files import size_text
from raysparse.space import Sweep
from raysparse.terminal import print_table


@app.command()
def plan(
    path: Annotated[Path, typer.Argument(help="A sweep file, such as tune_spaces/kanjivg.yaml.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results of an earlier sweep: its seconds per step, its learning curves; repeatable."),
    ] = None,
    step_seconds: Annotated[
        float | None, typer.Option(min=1e-9, help="Seconds of a training step, known from elsewhere; not measured.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of one trial's machine: its GPUs, or its CPUs where it has none.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Trials at a time; default what fits on this machine.")
    ] = None,
    worlds: Annotated[int, typer.Option(min=1, max=100, help="Simulations, each with its own luck.")] = 10,
    curves: Annotated[
        str | None, typer.Option(help="Simulate over a published data set's results, e.g. kanjivg.")
    ] = None,
    data: Data = None,
    changes: SweepChanges = None,
    cpus: Cpus = None,
    as_json: AsJson = False,
) -> None:
    """What a sweep will take: trials, steps, FLOPs, disk, hours, money, and what early stopping is expected to save.

    Nothing is started. Savings come from simulations of the sweep's own search and stopping over learning curves,
    recorded (--results) or made up from the papers' published results.
    """
    from raysparse.sweep.price import price

    if results and curves:
        raise UsageError("give --results or --curves, one of the two: both say which learning curves to simulate over")
    sweep = load_sweep(path, changes, data)
    found: dict[str, Any] = price(
        sweep,
        results=results or [],
        step_s=step_seconds,
        price_per_hour=price_per_hour,
        workers=workers,
        worlds=worlds,
        curves=curves,
        cpus=cpus,
    )
    if as_json:
        typer.echo(json.dumps(found))
        return
    show(sweep, found)


def show(sweep: Sweep, found: dict[str, Any]) -> None:
    """The price as two tables, at most 100 columns wide; with whole numbers where a terminal is narrower."""
    planned, full, expected = found["plan"], found["full"], found["expected"]
    console = Console(width=None if Console().is_terminal else 100, highlight=False)
    title = f"{planned['name']}: {planned['search_trials']} trials of {planned['steps_per_trial']:,} steps"
    methods = Table(title=title, title_justify="left")
    for name in ("method", "trials", "S", "params active", "test FLOPs / dense", "train FLOPs / dense"):
        methods.add_column(name, justify="left" if name == "method" else "right")
    for method in dict.fromkeys(row["method"] for row in planned["trials"]):
        rows = [row for row in planned["trials"] if row["method"] == method]
        test, train = (
            [row[f"flops_{phase}_true"] / row[f"flops_{phase}_dense_true"] for row in rows]
            for phase in ("inference", "train")
        )
        methods.add_row(
            method,
            str(len(rows)),
            _range([row["sparsity"] or 0.0 for row in rows], "{:g}"),
            _range([row["params_active"] for row in rows], "{:,}"),
            _range(test, "{:.3f}"),
            _range(train, "{:.3f}"),
        )
    print_table(methods, console)
    drawn = planned["search_trials"] - len(planned["trials"])
    if drawn > 0:
        console.print(f"and {drawn} more that {sweep.search.sampler if sweep.search else ''} draws as it learns")
    stopping = "early stopping" if sweep.asha else "another sampler's seed"
    table = Table(title=f"\nwhat it takes, {found['workers']} at a time", title_justify="left")
    for name in ("", "every trial to its end", f"with {stopping} (range)"):
        table.add_column(name, justify="right" if name else "left")
    for name, label, form in (
        ("completed", "trials of the search completed", _count),
        ("search_steps", "steps of the search", _count),
        ("confirm_trials", "trials of the confirm stage", _count),
        ("confirm_steps", "steps of the confirm stage", _count),
        ("flops_train_true", "training FLOPs", "{:.2e}".format),
        ("unit_hours", f"{found['unit']} hours", _hours),
        ("hours", "hours from start to end", _hours),
        ("money", f"money, at {found['price_per_hour'] or 0:g} an hour and trial", "{:,.2f}".format),
        ("checkpoints_bytes", "checkpoints on disk", size_text),
    ):
        if full[name] is not None and expected[name] is not None:
            one = expected[name]
            spread = "" if one["low"] == one["high"] else f" ({form(one['low'])} to {form(one['high'])})"
            table.add_row(label, form(full[name]), form(one["mean"]) + spread)
    print_table(table, console)
    console.print(_notes(sweep, found), soft_wrap=False)


def _notes(sweep: Sweep, found: dict[str, Any]) -> str:
    """Where the figures come from."""
    planned, saved = found["plan"], found["saved_share"]
    last = planned["last_evaluation_s"]
    longer = f" ({last:.3g} the last one of a trial)" if last != planned["evaluation_s"] else ""
    evaluation = f"{planned['evaluation_s']:.3g} an evaluation{longer}"
    lines = [f"seconds: {planned['step_s']:.3g} a step, {evaluation}; {found['timed']}"]
    if planned["caution"]:
        lines.append(f"  {planned['caution']}")
    if sweep.asha:
        stopped = ", ".join(f"{count:.1f} at step {step:,}" for step, count in found["stopped_at"].items())
        lines.append(
            f"early stopping saves {saved['mean']:.0%} of the search's steps ({saved['low']:.0%} to "
            f"{saved['high']:.0%} in {found['worlds']} simulations); stopped on average: {stopped or 'none'}"
        )
    if sweep.storage.checkpoints is not None:
        lines.append(
            f"beyond {size_text(sweep.storage.checkpoints)} of checkpoints those that nothing needs are removed"
        )
    lines.append(f"learning curves: {found['curves']}")
    if found["curves"].startswith("synthetic"):
        lines.append("  they are a model; `--results DIR` of a sweep that was run simulates over what was seen")
    return "\n".join(lines)


def _range(values: Sequence[float], form: str) -> str:
    low, high = (form.format(end) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"

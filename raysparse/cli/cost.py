"""`raysparse cost`: parameters and FLOPs before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raysparse import config, space
from raysparse.cli.app import (
    AsJson,
    Changes,
    app,
    load_trial,
)
from raysparse.errors import UsageError


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

"""`raysparse cost`: parameters and FLOPs before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from raysparse import config, plugins, space
from raysparse.axis import Range
from raysparse.cli.app import (
    AsJson,
    Changes,
    app,
    load_trial,
    parse_changes,
)
from raysparse.errors import UsageError

MOST_POINTS = 100_000  # of a sketch, which a model really goes through to be counted


@app.command()
def cost(
    path: Annotated[Path | None, typer.Argument(help="A sweep or trial file.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name instead of a file.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="S; repeatable.")] = None,
    allocation: Annotated[str | None, typer.Option(help="uniform, er or erk; default the file's, else erk.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Whose cost at each S, default a trial file's, else static; its settings by --set sparse.NAME=VALUE."
        ),
    ] = None,
    points: Annotated[float | None, typer.Option(help="Mean points of a sketch; default: the data set's.")] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Parameters and FLOPs, dense and at each S, in the papers' convention and in the true one."""
    from raysparse.terminal import print_cost
    from raysparse.train.checks import check_denoiser
    from raysparse.train.plan import cost_row

    if (path is None) == (model is None):
        raise UsageError("give a sweep file or --model NAME, one of the two")
    if points is not None and not 0 < points <= MOST_POINTS:  # NaN is not either
        raise UsageError(f"--points must be above 0 and at most {MOST_POINTS}, got {points:g}")
    own, others = _of_the_method(changes or [])
    base = load_trial(path, [*others, *([] if model is None else [f"model.name={model}"])], None)
    check_denoiser(base.model.name)
    content = base.model_dump(mode="json")
    trained = {name: value for name, value in content["sparse"].items() if value is not None}  # what a trial file says
    method = method or (trained["method"] if trained["method"] != "dense" else "static")
    plugins.load("methods", method)
    if method == trained.pop("method"):
        own = trained | own
    if allocation is not None:
        own["allocation"] = allocation
    shared = {"allocation": "erk"} | _shared_settings(path, method)
    sparsities = [0.0, *(sparsity or ([own.pop("sparsity")] if "sparsity" in own else _axis_sparsities(path)))]
    if "ranges" in config.method_settings(method):  # which say its sparsity
        sparsities = [0.0, config.parse({"sparse": {**shared, **own, "method": method}}, "cost").sparse.sparsity or 0.0]
    if own:  # also where no S asks for them
        config.parse({"sparse": {"method": method, **shared, **own}}, "cost")
    rows = []
    for value in [value for place, value in enumerate(sparsities) if value not in sparsities[:place]]:
        sparse = {"method": method, **shared, **own, "sparsity": value} if value else {"method": "dense"}
        rows.append(cost_row(config.parse({**content, "sparse": sparse}, "cost"), points))
    if as_json:
        typer.echo(json.dumps({"model": base.model.name, "options": base.model.options, "rows": rows}))
    else:
        print_cost(base, rows)


def _of_the_method(changes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The changes to a method's settings by name, and the others as they are."""
    own = [change for change in changes if change.startswith("sparse.") and not change.startswith("sparse.method=")]
    settings = {name.removeprefix("sparse."): value for name, value in parse_changes(own).items()}
    return settings, [change for change in changes if change not in own]


def _shared_settings(path: Path | None, method: str) -> dict[str, Any]:
    """What a sweep file's `base.sparse` says to the method."""
    if path is None or not {"grid", "search"} & set(space.load_yaml(path)):
        return {}
    found: dict[str, Any] = space.base_data(space.load(path), method)["sparse"]
    return found


def _axis_sparsities(path: Path | None) -> list[float]:
    """Every S that a sweep file's axes name; a range gives its two ends."""
    if path is None:
        return []
    content = space.load_yaml(path)
    if not {"grid", "search"} & set(content):
        return []
    values: set[float] = set()
    for axes in space.load(path).axes.values():
        axis = axes.get("sparsity", ())
        named = (axis.low, axis.high) if isinstance(axis, Range) else axis
        values |= {float(value) for value in named if value is not None}
    return sorted(values)

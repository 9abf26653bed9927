"""`raysparse gc`: room on the disk that holds a sweep's checkpoints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysparse.cli.app import AsJson, app
from raysparse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raysparse.sweep.storage import Stored


@app.command()
def gc(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="The results folder of a sweep.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; also while the sweep runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints of a sweep that nothing needs; of each one that is kept, say why.

    Kept are those that `resume`, `retry` and `evaluate` read: of open and failed trials, the dense baseline, the best
    of each method and rung, the Pareto front of FID and FLOPs, and all confirmed results.
    """
    from raysparse.sweep import control, folder, storage
    from raysparse.sweep.board import Board

    sweep, _ = folder.load(results)
    if dry_run:
        driven = control.driver(results).state == "running"
        stored = storage.Store(results, Board.load(results), sweep).survey(driven=driven)
        gone = [one for one in stored if not one.kept]
    else:
        try:
            with control.alone(results):
                store = storage.Store(results, Board.load(results), sweep)
                stored = store.survey(driven=False)
                gone = store.remove(one for one in stored if not one.kept)
        except folder.Busy as busy:
            raise UsageError(
                f"{busy}; it keeps to the file's own budget (storage: {{checkpoints: 50GB}}); after its end, or after "
                f"Ctrl-C there: raysparse gc {shlex.quote(str(results))}"
            ) from None
    kept = [one for one in stored if one not in gone]
    if as_json:
        sizes = {"kept_bytes": _total(kept), "gone_bytes": _total(gone), "dry_run": dry_run}
        typer.echo(json.dumps({"kept": storage.facts(kept), "gone": storage.facts(gone), **sizes}))
        return
    _print("kept", kept)
    _print("would go" if dry_run else "gone", gone)


def _print(title: str, stored: Sequence[Stored]) -> None:
    """One line each, in columns as wide as what is in them."""
    from raysparse.files import size_text

    typer.echo(f"{title}: {len(stored)} checkpoints, {size_text(_total(stored))}")
    width = max((len(one.trial_id) for one in stored), default=0)
    for one in stored:
        step = f"step {one.step:,}" if one.step >= 0 else "leftover"
        typer.echo(f"  {one.trial_id:{width}}  {step:>12}  {size_text(one.size_bytes):>8}  {one.why}")


def _total(stored: Sequence[Stored]) -> int:
    return sum(one.size_bytes for one in stored)

"""What has changed since a sweep began: versions, the code, the sweep file. Said, refused, or accepted on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raysparse import space
from raysparse.config import parse
from raysparse.errors import UsageError
from raysparse.files import write_text
from raysparse.space import Sweep
from raysparse.sweep import folder
from raysparse.sweep.board import Board

# What a trial computes, or how a sweep is walked, depends on these; a resume on another CPU or GPU is usual.
BINDING = ("raysparse", "code", "python", "torch", "diffusers", "torch-fidelity", "numpy", "ray", "optuna")


def differences(results: Path, sweep: Sweep | None = None) -> list[str]:
    """`ray 2.60.0 then, 2.61.0 now`, `asha.grace_steps 2 then, 4 now`: one line per difference; [] where there is none.

    sweep: the file to go on with; None: the folder's own.
    """
    from raysparse.train.versions import versions

    then = folder.read(results)
    now = {name: value for name, value in versions().items() if name in BINDING}
    found = _compare({name: then["versions"].get(name) for name in now}, now)
    if sweep is not None:
        found += _compare(then["sweep"], sweep.model_dump(mode="json"))
    return found


def refuse(results: Path, found: list[str]) -> None:
    """UsageError with the differences, where there are any."""
    if found:
        raise UsageError(
            f"the sweep in {results} began otherwise: {'; '.join(found)}. Go on as it began, or with --accept-changes, "
            "which is recorded; trials before and after may then not compare"
        )


def check(results: Path, sweep: Sweep) -> None:
    """UsageError where it is another sweep than the folder's: another base, or trials outside the new axes."""
    old = folder.load(results)[0]
    if space.parsed_base(old).content() != space.parsed_base(sweep).content() or bool(old.grid) != bool(sweep.grid):
        raise UsageError(
            f"{results} holds trials of another base or kind of walk: that is another sweep; give a new folder"
        )
    if sweep.search and old.search and sweep.search.objectives != old.search.objectives:
        raise UsageError(
            f"search.objectives was {list(old.search.objectives)}, is {list(sweep.search.objectives)}: a study has one "
            "set of objectives for all its trials; give a new folder"
        )
    # A grid may change as it likes: what has run stays. A study is rebuilt over the new axes, which must hold it.
    for row in Board.load(results).of_stage("search") if sweep.search else ():
        try:
            space.check_point(sweep, row.point)
        except ValueError as error:
            raise UsageError(
                f"trial {row.trial_id} of {results} does not belong to the new space ({error}); keep the axes wide "
                "enough for what has run, or give a new folder"
            ) from error


def check_planned(results: Path, board: Board) -> None:
    """UsageError where a trial that may yet run has other settings in the journal than those its id is made of."""
    for row in board.rows.values():
        if row.state != "COMPLETED" and (made := parse(row.config, row.trial_id).trial_id) != row.trial_id:
            raise UsageError(
                f"{results / 'journal.jsonl'}: trial {row.trial_id} has the settings of {made}, so it was changed by "
                "hand; restore the journal from a copy"
            )


def accept(results: Path, sweep: Sweep) -> None:
    """Make the folder go on with `sweep` and the versions of now; called with the lock held. UsageError as `check`."""
    from raysparse.train.versions import versions

    check(results, sweep)
    content = folder.read(results) | {
        "sweep": sweep.model_dump(mode="json"),
        "digest": sweep.digest,
        "versions": versions(),
    }
    write_text(results / "sweep.json", json.dumps(content, indent=2) + "\n")


def _compare(then: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        names = sorted(then.keys() | now.keys())
        return [line for name in names for line in _compare(then.get(name), now.get(name), f"{path}.{name}".strip("."))]
    return [] if then == now else [f"{path} {_short(then)} then, {_short(now)} now"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

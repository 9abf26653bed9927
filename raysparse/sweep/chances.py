"""Second chances: trials that ASHA stopped go on after all, once the search has nothing new to try.

ASHA decides as reports come in. Who comes early is compared with nobody or with few, so one that belongs to the best of
its rung, seen from the end, may have been stopped. Its checkpoint is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from raysparse.asha import Asha
from raysparse.sweep import views
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.journal import event


def candidates(board: Board, asha: Asha) -> Iterator[tuple[Row, str]]:
    """The trials that ASHA stopped, in the order in which they would go on, and why; as many as chances are left.

    First those among the best 1 / reduction_factor of their rung, from the highest rung down; then the others from the
    lowest rung up, where going on to the next one costs least. Of a rung the best first.
    """
    left = _left(board, asha) or int(_owed(board, asha))
    if not left:
        return
    rows = board.of_stage("search")
    rungs = views.rungs(board, asha, max((row.total_steps for row in rows), default=0))
    last: dict[str, tuple[float, int]] = {}  # trial -> the highest rung it has reached, its place there
    for step, at in sorted(rungs.items()):
        for place, name in enumerate(sorted(at, key=lambda name: (at[name], name)), start=1):
            last[name] = (step, place)
    ranked = []
    for row in rows:
        if row.state == "STOPPED" and not row.stopped_by and row.trial_id in last:
            step, place = last[row.trial_id]
            good = place <= len(rungs[step]) / asha.reduction_factor
            ranked.append((not good, -step if good else step, place, row))
    for _, step, place, row in sorted(ranked, key=lambda one: one[:3])[:left]:
        yield row, f"place {place} of {len(rungs[abs(step)])} at rung {abs(step):,.0f} in the end"


def take(ledger: Ledger, asha: Asha | None, number: int | None = None) -> Row | None:
    """The next trial to go on, on record; None where there is none. number: of the Optuna trial that stands for it."""
    if asha is None or not asha.second_chances or (not _left(ledger.board, asha) and running(ledger.board, "search")):
        return None
    if asha.explore_first and _exploring(ledger.board, asha):
        return None
    for row, why in candidates(ledger.board, asha):
        ledger.add(
            event("second_chance", stage="search", trial_id=row.trial_id, number=number, step=row.step, reason=why)
        )
        return row
    return None


def running(board: Board, stage: str, waiting: Collection[str] = ()) -> bool:
    """Whether a trial of the stage is open, those that are `waiting` left out: it may yet be stopped and then go on, or
    be given up by Tune. With several workers this is asked very often."""
    rows = (row for row in reversed(board.rows.values()) if row.stage == stage)  # the latest are open
    return any(row.open and row.trial_id not in waiting for row in rows)


def _exploring(board: Board, asha: Asha) -> bool:
    """Whether a trial that will stop at the first rung has yet to come there: it may be one of the best of all."""
    return any(
        row.open and row.stage == "search" and row.method != "dense" and row.step < asha.rung_steps(row.total_steps)[0]
        for row in reversed(board.rows.values())
    )


def _left(board: Board, asha: Asha) -> int:
    return max(asha.second_chances - board.second_chances, 0)


def _owed(board: Board, asha: Asha) -> bool:
    """Whether there is one chance more, one at a time: as long as no trial but the dense baseline has been completed.

    At a rung that few have reached the best of them may not go on either, so the chances may end before one is through.
    """
    if not asha.second_chances:
        return False
    return not any(row.state == "COMPLETED" and row.method != "dense" for row in board.of_stage("search"))

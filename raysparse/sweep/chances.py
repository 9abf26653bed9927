"""Second chances: trials that ASHA stopped go on after all, once the search has nothing new to try.

ASHA decides as reports come in. Who comes early is compared with nobody or with few, so one that belongs to the best of
its rung, seen from the end, may have been stopped. Its checkpoint is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from raysparse.space import Asha
from raysparse.sweep import views
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.journal import event


def candidates(board: Board, asha: Asha) -> Iterator[tuple[Row, str]]:
    """The trials that ASHA stopped, in the order in which they would go on, and why; as many as chances are left.

    First those among the best 1 / reduction_factor of their rung, rounded up, then the others; from the highest rung
    down, and of a rung the best first.
    """
    left = asha.second_chances - board.second_chances
    if left <= 0:
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
            good = place <= math.ceil(len(rungs[step]) / asha.reduction_factor)
            ranked.append((not good, -step, place, row))
    for _, step, place, row in sorted(ranked, key=lambda one: one[:3])[:left]:
        yield row, f"place {place} of {len(rungs[-step])} at rung {-step:,.0f} in the end"


def take(ledger: Ledger, asha: Asha | None, number: int | None = None) -> Row | None:
    """The next trial to go on, on record; None where there is none. number: of the Optuna trial that stands for it."""
    for row, why in candidates(ledger.board, asha) if asha else ():
        ledger.add(
            event("second_chance", stage="search", trial_id=row.trial_id, number=number, step=row.step, reason=why)
        )
        return row
    return None


def may_come(board: Board, asha: Asha | None) -> bool:
    """Whether a trial that is open may yet be stopped and then go on."""
    left = asha.second_chances - board.second_chances if asha else 0
    return left > 0 and any(row.open for row in board.of_stage("search"))

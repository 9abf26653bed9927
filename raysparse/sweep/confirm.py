"""The confirm stage: the best configurations of the search and the dense baseline again, on fresh seeds, to the end.

The best of each method; of a search with several objectives, members of its Pareto front.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from raysparse import space
from raysparse.space import Confirm, Point, Sweep
from raysparse.sweep import objectives
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.journal import event
from raysparse.sweep.search import planned


def plan(sweep: Sweep, ledger: Ledger) -> None:
    """Choose the winners, once, and plan their trials. Goes on where a killed driver left off.

    Of a sweep that was changed, such as by more trials, a better one is confirmed beside those of before. One that a
    retry completes waits for such a change: else a retry would cost confirmations that nobody asked for. A front is
    filled up to `confirm.front` and no further: each new member would shift all between its ends.
    """
    assert sweep.confirm
    board = ledger.board
    # A kill while choosing leaves some winners unchosen: the search is over, so the rest comes out the same.
    several = sweep.search is not None and len(sweep.search.objectives) > 1
    chosen = {str(item.trial_id) for item in board.chosen}
    searched = board.of_stage("search")
    winners = (
        choose_front(searched, sweep.confirm, chosen)
        if several
        else choose(searched, sweep.confirm, chosen, board.chosen_before)
    )
    for row, reason in winners:
        ledger.add(event("chosen", stage="confirm", trial_id=row.trial_id, point=row.point, reason=reason))
    points: list[Point] = [item.point for item in board.chosen if item.point]
    if not any(point["method"] == "dense" for point in points):
        points.insert(0, {"method": "dense"})
    for seed in sweep.confirm.seeds:
        for point in points:
            trial = space.trial(sweep, point, seed=seed)
            if trial.trial_id not in board.rows:
                ledger.add(planned(trial, point, "confirm"))


def choose(
    rows: list[Row], confirm: Confirm, chosen: Collection[str] = (), before: Collection[str] = ()
) -> Iterator[tuple[Row, str]]:
    """The best completed rows of each method by FID, and why; a method of which no trial ended sound has none.

    chosen: trials that were chosen already; they come no second time, and count unless it was before the sweep was
    changed (`before`).
    """
    counted = set(chosen) - set(before)
    for method in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == method]
        left = max(confirm.best_per_method - sum(row.trial_id in counted for row in of_method), 0)
        done = sorted((row for row in of_method if row.state == "COMPLETED"), key=_by_fid)
        best = enumerate(done[: confirm.best_per_method], start=1)
        ranked = [(place, row) for place, row in best if row.trial_id not in chosen]
        for place, row in ranked[:left]:
            yield row, f"place {place} of {len(done)} completed trials of {method}, FID {row.fid:.4g}"
        if done:
            continue
        stopped = [row for row in of_method if row.state == "STOPPED" and row.trial_id not in chosen]
        # ASHA may stop all of a method: the one that came furthest stands in, and says so.
        for row in sorted(stopped, key=lambda row: (-row.step, *_known(row.latest, row)))[:left]:
            name = "intermediate FID" if row.intermediate else "FID"
            yield (
                row,
                (
                    f"no trial of {method} was completed; the furthest: step {row.step} of {row.total_steps}, "
                    f"{name} {row.latest:.4g}"
                ),
            )


def choose_front(rows: list[Row], confirm: Confirm, chosen: Collection[str] = ()) -> Iterator[tuple[Row, str]]:
    """At most `confirm.front` completed rows of the Pareto front: both ends, and the others evenly spread between.

    chosen: trials that were chosen already; they count, and come no second time.
    """
    front = objectives.front_of(rows)
    count = min(confirm.front, len(front))
    left = confirm.front - len(chosen)
    for place in range(count):
        row = front[round(place * (len(front) - 1) / max(count - 1, 1))]
        if row.trial_id not in chosen and left > 0:
            left -= 1
            yield (
                row,
                f"{place + 1} of {count} taken from the {len(front)} on the Pareto front: {objectives.words(row)}",
            )


def _by_fid(row: Row) -> tuple[float, str]:
    return _known(row.fid, row)


def _known(fid: float | None, row: Row) -> tuple[float, str]:
    return (fid if fid is not None else float("inf"), row.trial_id)

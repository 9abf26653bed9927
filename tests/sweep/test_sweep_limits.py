"""Hard limits: what counts, and that a sweep which reaches one ends cleanly and goes on later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raysparse.errors import UsageError
from raysparse.files import size_bytes
from raysparse.space import Resources, Sweep
from raysparse.sweep import limits, tuner
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.journal import event, read
from raysparse.sweep.limits import Guard, Limits
from raysparse.sweep.search import Suggested


def board_of(*rows: tuple[str, float | None, float]) -> Board:
    """Rows of (state, heard, busy_s)."""
    board = Board()
    for number, (state, heard, busy_s) in enumerate(rows):
        row = Row(str(number), "search", "rigl", {}, 0, 8, {}, number)
        row.state, row.heard, row.busy_s = state, heard, busy_s
        board.rows[row.trial_id] = row
    return board


def guard(board: Board, tmp_path: Path, gpus: float = 0, **given: float) -> Guard:
    return Guard(Limits(**given), Resources(workers=2, gpus_per_worker=gpus), tmp_path, board)  # type: ignore[arg-type]


def test_no_limit_is_never_reached(tmp_path: Path) -> None:
    nothing = guard(board_of(("RUNNING", 1.0, 1e9)), tmp_path, gpus=8)
    assert nothing.may_start()
    assert nothing.reached() is None


def test_trials_that_have_begun_count_and_may_end(tmp_path: Path) -> None:
    board = board_of(("COMPLETED", 1.0, 0), ("PENDING", 2.0, 0), ("PENDING", None, 0))
    two = guard(board, tmp_path, max_trials=2)
    assert two.may_start(board.rows["1"])  # it had begun
    assert not two.may_start(board.rows["2"])
    assert not two.may_start()
    assert two.reached() is None  # one is to go on
    board.rows["1"].state = "STOPPED"
    assert two.reached() == "--max-trials 2 is reached"
    assert guard(board, tmp_path, max_trials=3).may_start(board.rows["2"])


def test_what_is_left_of_a_limit_ends_nothing_where_no_trial_is_to_come(tmp_path: Path) -> None:
    board, more = board_of(("COMPLETED", 1.0, 0), ("STOPPED", 2.0, 0)), [False]
    full = Guard(Limits(max_trials=2), Resources(), tmp_path, board, more=lambda: more[0])
    assert not full.may_start()
    assert full.reached() is None
    more[0] = True
    assert full.reached() == "--max-trials 2 is reached"


def test_a_search_at_its_limit_has_its_next_trial_planned_or_none(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    def ended(count: int, begun: int) -> tuple[list[object], list[str]]:
        """What a search of three points suggests when `begun` trials were allowed and ended, and the trials' states."""
        place = tmp_path / f"{count} {begun}"
        place.mkdir()
        ledger = Ledger(place)
        axes = {"dense": {}, "static": {"sparsity": [0.5, 0.75]}}
        search = Suggested(sweep_of(search={"trials": count, "axes": axes}), ledger, lambda row: {"id": row.trial_id})
        guard = Guard(Limits(max_trials=begun), Resources(), place, ledger.board)
        search.may_start = guard.may_start
        said: list[object] = []
        for number in range(begun):
            search.suggest(str(number))
            name = search._ours[str(number)]
            ledger.add(event("started", stage="search", trial_id=name))
            said.append(search.suggest("too many") if number == begun - 1 else None)
            ledger.add(event("completed", stage="search", trial_id=name, step=8, fid=1.0))
            search.on_trial_complete(str(number))
        said.append(search.suggest("after all"))
        states = [row.state for row in ledger.board.rows.values()]
        ledger.close()
        return said[-2:], states

    done = ["COMPLETED"] * 3
    assert ended(3, 3) == ended(9, 3) == ([None, "FINISHED"], done), "a resume would find nothing to do"
    assert ended(3, 2) == ([None, "FINISHED"], ["COMPLETED", "COMPLETED", "PENDING"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_ends_at_its_limit_is_finished(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    axes = {"dense": {}, "static": {"sparsity": [0.5, 0.75]}}
    sweep, out = sweep_of(search={"trials": 3, "sampler": "random", "axes": axes}, asha=None), tmp_path / "out"
    first = tuner.run(sweep, out, command="", limits=Limits(max_trials=2), num_cpus=1, temp_dir=ray_home)
    assert (first.interrupted, first.limit) == (True, "--max-trials 2 is reached")
    for most in (2, 3):
        again = tuner.resume(out, limits=Limits(max_trials=most), num_cpus=1, temp_dir=ray_home)
        assert (again.interrupted, again.limit) == (True, f"--max-trials {most} is reached")
        assert sum(row.state == "COMPLETED" for row in again.board.rows.values()) == most
    last = tuner.resume(out, limits=Limits(max_trials=5), num_cpus=1, temp_dir=ray_home)
    assert (last.interrupted, last.limit, last.board.finished) == (False, None, True)
    assert last.board.counts() == {"COMPLETED": 5}, "3 of the search, dense and static once more"


def test_gpu_hours_are_of_all_workers(tmp_path: Path) -> None:
    board = board_of(("COMPLETED", 1.0, 3600.0), ("STOPPED", 1.0, 1800.0))
    assert guard(board, tmp_path, gpus=1, max_gpu_hours=3.1).reached() is None
    assert guard(board, tmp_path, gpus=1, max_gpu_hours=3).reached() == "--max-gpu-hours 3 is reached: 3.00 GPU hours"
    assert guard(board, tmp_path, gpus=0, max_gpu_hours=0.1).reached() is None  # there are none


def test_hours_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--max-hours" in str(guard(Board(), tmp_path, max_hours=1e-12).reached())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a").write_bytes(b"x" * 700)
    (tmp_path / "b").write_bytes(b"x" * 300)
    assert limits.disk_bytes(tmp_path) == 1000
    full = guard(Board(), tmp_path, max_disk_bytes=1001)
    assert full.reached() is None
    (tmp_path / "b").write_bytes(b"x" * 301)
    assert full.reached() is None  # it does not look again at once
    monkeypatch.setattr(limits, "DISK_LOOK_S", 0.0)
    assert "--max-disk 1,001 bytes is reached: 1,001 in" in str(full.reached())
    (tmp_path / "b").unlink()
    assert full.reached()  # it stays so


@pytest.mark.parametrize(
    ("text", "expected"), [("500", 500), ("1KB", 1000), ("1.5 GB", 1_500_000_000), ("2MiB", 2**21), ("3TiB", 3 * 2**40)]
)
def test_sizes(text: str, expected: int) -> None:
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 apples", "1e999GB", "nanGB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="such as 500GB"):
        size_bytes(text)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_reaches_a_limit_ends_cleanly_and_goes_on(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    sweep = sweep_of(search=None, asha=None, confirm=None, grid={"static": {"sparsity": [0.5, 0.75, 0.9]}})
    out = tmp_path / "out"
    first = tuner.run(sweep, out, command="", limits=Limits(max_trials=2), num_cpus=1, temp_dir=ray_home)
    assert (first.interrupted, first.limit) == (True, "--max-trials 2 is reached")
    states = [row.state for row in first.board.rows.values()]
    assert states == ["COMPLETED", "COMPLETED", "PENDING", "PENDING"]
    assert "--max-trials 2 is reached; go on with" in str(list(read(out / "journal.jsonl"))[-1].reason)
    assert not (out / "pause").exists()

    second = tuner.resume(out, limits=Limits(max_hours=1e-12), num_cpus=1, temp_dir=ray_home)
    assert "--max-hours" in str(second.limit)
    last = tuner.resume(out, num_cpus=1, temp_dir=ray_home)
    assert (last.interrupted, last.limit) == (False, None)
    assert {row.state for row in last.board.rows.values()} == {"COMPLETED"}

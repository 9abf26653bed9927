"""The screen of a sweep: it fits, cuts only what may be cut, and nothing in a reason steers the terminal."""

from __future__ import annotations

import io
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from raysparse.screen import SweepDisplay, event_line, headline_of, sweep_screen
from raysparse.sweep.board import Board
from raysparse.sweep.journal import Event, event


def board_of(count: int) -> Board:
    board = Board()
    states = ("completed", "stopped", "failed", "report", "planned")
    for number in range(count):
        name, kind = f"rigl-{number:010d}", states[number % 5]
        config = {"sparse": {"sparsity": 0.9, "prune_ratio": 0.328645, "update_interval": 1000}}
        board.apply(event("planned", stage="search", trial_id=name, method="rigl", total_steps=100_000, config=config))
        if kind != "planned":
            board.apply(Event("started", float(number), trial_id=name))
            reason = "FID 34.32 above the cutoff 34.32 at step 32, place 20 of 100, " * 2
            board.apply(
                Event(
                    kind, number + 0.5, trial_id=name, step=100_000, fid=123.456,
                    reason=reason if kind in ("stopped", "failed") else None,
                )
            )  # fmt: skip
    return board


def drawn(board: Board, width: int, height: int, lines: int = 4) -> list[str]:
    latest = [(time.time() - 5, f"report {number} " * 20) for number in range(lines)]
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(sweep_screen(board, headline_of(board, 600), latest, height, ["a hint"]))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [40, 50, 60, 70, 80])
def test_a_narrow_window_has_fewer_columns_and_whole_ones(width: int) -> None:
    head, *lines = drawn(board_of(7), width, 24)[1:9]
    assert ("seed" in head) == (width == 80)
    assert head.split()[0] == "trial"
    assert head.split()[-2:] == ["FID", "state"]
    for line in lines[:-1]:
        assert cell_len(line) <= width
        words = line.split()
        assert len(words[0]) == len("rigl-0000000000")
        assert all("…" not in word for word in words[: len(head.split()) - 2])


def test_trials_that_differ_in_other_settings_are_told_apart() -> None:
    board, point = Board(), {"method": "rigl", "sparsity": 0.5, "optimizer.lr": 0.003, "pattern": "block"}
    for number, lr in enumerate((0.003, 0.001)):
        name, config = f"rigl-{number:010d}", {"sparse": {"sparsity": 0.5}}
        told = {"trial_id": name, "method": "rigl", "total_steps": 100, "config": config}
        board.apply(event("planned", stage="search", point=point | {"optimizer.lr": lr}, **told))
    head, *lines = drawn(board, 80, 24)[1:4]
    assert head.split() == ["trial", "S", "p", "ΔTe", "other", "settings", "step", "FID", "state"]
    assert [line.split()[1:4] for line in lines] == [
        ["0.5", "lr=0.003", "pattern=block"],
        ["0.5", "lr=0.001", "pattern=block"],
    ]
    assert "other" not in drawn(board, 60, 24)[1]
    assert "other" not in drawn(board_of(7), 200, 24)[1]
    said = event_line(event("started", trial_id="rigl-0000000001"), board)
    assert said == "started    rigl-0000000001 S=0.5 lr=0.001 pattern=block"


@pytest.mark.parametrize("count", [0, 1, 7, 40, 600])
@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24), (200, 50)])
def test_it_fits_the_window_and_keeps_every_number(count: int, width: int, height: int) -> None:
    board = board_of(count)
    lines = drawn(board, width, height)
    assert len(lines) < height
    assert all(cell_len(line) <= width for line in lines)
    assert lines[-1] == "a hint"
    for line in lines:
        if line.startswith("rigl-"):
            words = line.split()
            assert len(words[0]) == len("rigl-0000000000")
            assert words[1:4] == ["0.9", "0.329", "1e+03"]
            assert "/100,000" in line
            assert len(words) == 7 or "123.456" in line


def test_what_runs_is_never_left_out_and_what_is_left_out_is_counted() -> None:
    board = board_of(60)
    lines = drawn(board, 100, 30)
    running = [line for line in lines if "running" in line and line.startswith("rigl-")]
    assert len(running) == 12
    assert lines.index(running[-1]) > max(
        n for n, line in enumerate(lines) if "completed" in line[:99] and "rigl" in line
    )
    left = 60 - sum(line.startswith("rigl-") for line in lines)
    [said] = [line for line in lines if line.startswith("and ")]
    assert sum(int(word) for word in said.split() if word.isdigit()) == left


def test_the_headline_counts() -> None:
    board = board_of(10)
    board.apply(event("stage", stage="search"))
    assert headline_of(board, 600) == (
        "search: 10 of 600 trials planned; 2 running, 2 pending, 2 completed, 2 stopped, 2 failed"
    )


def test_every_kind_of_event_is_said_in_one_line() -> None:
    board = board_of(1)
    name = next(iter(board.rows))
    said = {
        kind: event_line(event(kind, trial_id=name, step=2, fid=3.0, reason="why", by="me@here"), board)
        for kind in ("started", "report", "stopped", "completed", "failed", "reopened", "note", "chosen")
    }
    assert all(line and name in line and "\n" not in line for line in said.values())
    assert str(said["reopened"]).endswith("why; by me@here")
    assert event_line(event("planned", trial_id=name), board) is None


def test_a_driver_without_a_terminal_says_lines(capsys: pytest.CaptureFixture[str]) -> None:
    board = board_of(1)
    with SweepDisplay(board, 1) as display:
        display.on_event(event("failed", trial_id="rigl-0000000000", reason="[red]not markup[/red]"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "FAILED     rigl-0000000000 S=0.9 p=0.329 ΔTe=1e+03: [red]not markup[/red]" in err


def test_nothing_in_a_journal_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    board = board_of(1)
    hostile = "\x1b[2J\x1b]0;title\x07 up\nand away\r"
    with SweepDisplay(board, 1) as display:
        display.on_event(event("failed", trial_id="rigl-0000000000", reason=hostile))
    said = capsys.readouterr().err + "\n".join(drawn(board, 100, 30))
    assert "up and away" in said
    assert not any(sign in said for sign in "\x1b\x07\r")

"""A sweep on the screen: the live table of `raysparse sweep` and `raysparse watch`, plain lines where there is none."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raysparse.sweep.trial_log import printable
from raysparse.terminal import duration

if TYPE_CHECKING:
    from raysparse.sweep.board import Board, Row
    from raysparse.sweep.journal import Event

LATEST = 4  # events under the table
LEFT_FOR_TABLE = 12  # lines of a small window that the table gets at least


class SweepDisplay:
    """Shows a sweep as its driver goes, through `on_event`; on stderr."""

    def __init__(self, board: Board, total: int) -> None:
        """board: what has happened so far (a resumed sweep's table starts full); total: trials of the search stage."""
        self._board = board
        self._total = total
        self._start = time.monotonic()
        self._latest: list[tuple[float, str]] = []
        self._failed: list[str] = []  # the last lines of the trial that failed last
        console = Console(stderr=True)
        self._console = console
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=2) if console.is_terminal else None
        )

    def __enter__(self) -> SweepDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def on_event(self, item: Event) -> None:
        self._board.apply(item)
        line = event_line(item, self._board)
        if line is None:
            return
        self._latest = [*self._latest, (item.time, line)][-LATEST:]
        lines = log_lines(item, self._board)
        if self._live is None:
            print_lines(self._console, f"[{duration(time.monotonic() - self._start)}] {line}", *lines)
        elif lines:  # above the table, where it stays to be read
            print_lines(self._console, line, *lines)

    def _render(self) -> RenderableType:
        headline = f"{headline_of(self._board, self._total)}; {duration(time.monotonic() - self._start)}"
        return sweep_screen(self._board, headline, self._latest, self._console.height, hints_of(self._board))


def headline_of(board: Board, total: int) -> str:
    """`search: 4 of 6 trials planned; 1 running, 2 completed, 1 failed`."""
    words = [_word(row).lower() for row in list(board.rows.values())]
    shown = ", ".join(f"{words.count(word)} {word}" for word in _WORDS if word in words)
    planned = len(board.of_stage("search"))
    there = f"{planned} trials" if planned >= total else f"{planned} of {total} trials planned"
    confirm = len(board.of_stage("confirm"))
    return f"{board.stage or 'starting'}: {there}{f' + {confirm} to confirm' * bool(confirm)}; {shown or 'none begun'}"


def sweep_screen(
    board: Board, headline: str, latest: Sequence[tuple[float, str]], height: int | None, below: Sequence[str] = ()
) -> RenderableType:
    """The whole screen. height: of the window in lines, None for all trials; below: what else a person should read."""
    rows = list(board.rows.values())
    reserved = 4 + len(latest) + len(below)  # headline, heads of the columns, what is not shown, and one line free
    room = len(rows) if height is None else max(height - reserved, min(LEFT_FOR_TABLE, height // 3))
    # Nearest to the prompt is what runs, above it what ended last; what waits is shown where there is room.
    ranked = sorted(rows, key=lambda row: (_RANK[row.state], -(row.heard or 0)))
    shown = ranked[:room]
    shown.sort(key=lambda row: (_SHOWN.index(row.state), row.heard or 0))
    left = ranked[room:]
    table = TrialTable(shown)
    parts: list[RenderableType] = [_line(headline, "bold"), table]
    if left:
        states = [row.state for row in left]
        counts = ", ".join(f"{states.count(state)} {state.lower()}" for state in dict.fromkeys(states))
        parts.append(_line(f"and {counts} not shown", "dim"))
    now = time.time()
    parts += [_line(f"{duration(max(now - when, 0)):>6} ago  {line}") for when, line in latest]
    parts += [_line(text, "bold") for text in below]
    return Group(*parts)


def hints_of(board: Board) -> list[str]:
    """The best so far, and what a person may want to look at while a sweep runs."""
    from raysparse.sweep import objectives, views

    best = [one for one in views.best(list(board.rows.values())) if one["stage"] == board.stage]
    hints = intermediate_hint(list(board.rows.values()))
    if best and not best[0]["protocol"]:
        shown = ", ".join(f"{one['method']} {one['fid']:.3f}" for one in best if one["state"] == "COMPLETED")
        hints += [f"best completed: {shown}"] if shown else []
    if front := objectives.front_of(list(board.rows.values())):
        ends = dict.fromkeys(objectives.words(row) for row in (front[0], front[-1]))
        hints.append(f"on the Pareto front: {len(front)}, from {' to '.join(ends)}")
    failed = [row.trial_id for row in list(board.rows.values()) if row.state == "FAILED"]
    if failed and board.folder is not None:
        hints.append(f"{len(failed)} failed; why: raysparse show {shlex.quote(str(board.folder))} {failed[-1]}")
    return hints


def intermediate_hint(rows: Sequence[Row]) -> list[str]:
    """What brackets in the table mean, where there are any."""
    found = [row.config["evaluate"]["intermediate"] for row in rows if row.intermediate and row.fid is None]
    return [f"in brackets: {intermediate_words(found[0])}"] if found else []


def intermediate_words(protocol: Mapping[str, Any]) -> str:
    return (
        f"intermediate FID, of {protocol['generated']:,} samples and {protocol['ddim_steps']} DDIM steps: no result, "
        "and not to be compared with a FID"
    )


class TrialTable:
    """A line per trial; the last column says why it is not what one hoped for, and is cut where there is no room.

    With still less room the columns that are missed least are left out, whole.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        cells = [_cells(row) for row in self._rows]
        widths = [max(cell_len(text) for text in column) for column in zip(_COLUMNS, *cells, strict=True)]
        shown = dict(zip(_COLUMNS, widths, strict=True))
        if not any(texts[_COLUMNS.index(_OTHERS)] for texts in cells):
            del shown[_OTHERS]
        missed_least = (name for name in _MISSED_LEAST if name in shown)
        while (room := options.max_width - sum(list(shown.values())[:-1]) - 2 * (len(shown) - 1)) < _STATE:
            if (name := next(missed_least, None)) is None:
                break
            del shown[name]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in shown:
            table.add_column(name, justify="left" if name in ("trial", _OTHERS, "state") else "right", no_wrap=True)
        for row, texts in zip(self._rows, cells, strict=True):
            state = Text(texts[-1])
            state.truncate(max(room, _STATE), overflow="ellipsis")
            kept = [text for name, text in zip(_COLUMNS, texts, strict=True) if name in shown]
            table.add_row(*kept[:-1], state, style=_STYLES.get(row.state))
        yield table


_WORDS = ("running", "open", "pending", "completed", "stopped", "failed")
_SHOWN = ("PENDING", "FAILED", "STOPPED", "COMPLETED", "RUNNING")
_RANK = {"RUNNING": 0, "FAILED": 1, "STOPPED": 1, "COMPLETED": 1, "PENDING": 2}
_STYLES = {"FAILED": "red", "STOPPED": "dim", "RUNNING": "bold", "COMPLETED": "green"}
_SIGNS = {"sparsity": "S", "prune_ratio": "p", "update_interval": "ΔTe"}
_OTHERS = "other settings"
_COLUMNS = ("trial", *_SIGNS.values(), _OTHERS, "seed", "step", "FID", "state")
_MISSED_LEAST = ("seed", _OTHERS, "ΔTe", "p", "S", "step")
_STATE = 9  # cells that the last column has at least: `completed`


def _cells(row: Row) -> list[str]:
    settings = [row.setting(name) for name in _SIGNS]
    state = _word(row)
    if row.since is not None:
        state += f" for {duration(max(time.time() - row.since, 0))}"
    return [
        row.trial_id,
        *("" if value is None else f"{value:.3g}" for value in settings),
        _others(row),
        str(row.seed),
        f"{row.step:,}/{row.total_steps:,}",
        _fid(row),
        printable(f"{state}: {row.reason}") if row.reason else state,
    ]


def _others(row: Row) -> str:
    """The point's settings that have no column of their own: `lr=0.003 pattern=block`."""
    found = {name: value for name, value in row.point.items() if name != "method" and name not in _SIGNS}
    words = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in found.items()}
    return printable(" ".join(f"{name.rpartition('.')[2]}={text}" for name, text in words.items()))


def _fid(row: Row) -> str:
    if row.fid is not None:
        return f"{row.fid:.3f}"
    return "" if row.latest is None else f"({row.latest:.3f})"


def _word(row: Row) -> str:
    """The state as a person reads it: begun, but in no process now, is open."""
    if row.state == "RUNNING" and row.since is None and row.heard is not None:
        return "open"
    return row.state if row.state == "FAILED" else row.state.lower()


def event_line(item: Event, board: Board) -> str | None:
    """One event in words; None for what nobody needs to read."""
    row = board.rows.get(item.trial_id or "")
    name = _name(row) if row else item.trial_id or ""
    values = (("FID", item.fid), ("intermediate FID", item.intermediate_fid))
    fid = "".join(f", {name} {value:.3f}" for name, value in values if value is not None)
    match item.kind:
        case "planned" | "repeated":
            return None
        case "stage":
            return f"== {item.stage}" + (f": {item.reason}" if item.reason else "")
        case "started":
            return f"started    {name}" + (f" after the report of step {item.step}" if item.step else "")
        case "report":
            return f"report     {name}: step {item.step}/{row.total_steps if row else '?'}{fid}"
        case "stopped":
            step = "" if item.step is None else f" at step {item.step}"
            return f"stopped    {name}{step}{fid}" + (f" ({item.reason})" if item.reason else "")
        case "completed":
            return f"completed  {name}{fid}"
        case "failed":
            return f"FAILED     {name}: {item.reason}"
        case "chosen":
            return f"chosen     {name}: {item.reason}"
        case "second_chance":
            return f"goes on    {name} from step {item.step}: a second chance, {item.reason}"
        case "reopened":
            return f"reopened   {name}: {item.reason}; by {item.by}"
        case _:
            of_trial = f" {name}" if name else ""
            return f"{item.kind}{of_trial}" + (f": {item.reason}" if item.reason else "")


def log_lines(item: Event, board: Board) -> list[str]:
    """What a trial that failed said last, indented; nothing for other events, or where its log cannot be read."""
    if item.kind != "failed" or board.folder is None or item.trial_id is None:
        return []
    from raysparse.sweep import trial_log

    return [f"    | {line}" for line in trial_log.tail(board.folder / "trials" / item.trial_id)]


def print_lines(console: Console, *lines: str) -> None:
    """As they are: neither markup nor colours, and cut nowhere."""
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _name(row: Row) -> str:
    shown = [f"{sign}={row.setting(name):.3g}" for name, sign in _SIGNS.items() if row.setting(name) is not None]
    seed = f"seed={row.seed}" if row.stage == "confirm" else ""
    return " ".join(filter(None, [row.trial_id, *shown, _others(row), seed]))


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, overflow="ellipsis", no_wrap=True)

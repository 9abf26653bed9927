"""`raysparse watch, metrics`: see a sweep from any machine that sees its results folder."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysparse.cli.app import AsJson, app

if TYPE_CHECKING:
    from rich.console import RenderableType

    from raysparse.sweep.board import Board
    from raysparse.sweep.journal import Event
    from raysparse.sweep.views import View

LOOK_S = 1.0  # between two looks at the journal


@app.command()
def watch(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="The results folder of a sweep.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a sweep until it ends, from any machine that sees its folder; plain lines where there is no terminal.

    With --json the journal's events, one per line; with --once --json one object. Exit code 1: its driver was killed.
    """
    from raysparse.sweep import folder, views

    folder.load(results)  # UsageError where it is not a sweep's
    if once:
        view = views.load(results)
        if as_json:
            table = [views.trial_facts(row) for row in view.board.rows.values()]
            typer.echo(json.dumps(views.sweep_facts(view) | {"table": table}))
        else:
            _print_once(view)
        return
    watching = _Watching(results, as_json)
    try:
        view = watching.follow()
    except KeyboardInterrupt:
        typer.echo(f"the sweep goes on; watch it again with: raysparse watch {shlex.quote(str(results))}", err=True)
        raise typer.Exit(130) from None
    if not as_json:
        typer.echo(_ending(view))
    if view.state == "gone":
        raise typer.Exit(1)


@app.command()
def metrics(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's results folder, or a folder of several.")],
    prometheus_url: Annotated[
        str, typer.Option("--prometheus", help="Where Grafana finds Prometheus.")
    ] = "http://127.0.0.1:9090",
    as_json: AsJson = False,
) -> None:
    """Write what Prometheus and Grafana need to show the sweeps: DIR/metrics, with a dashboard."""
    from raysparse.sweep import dashboards, views

    sweeps = [path for path in views.find(folder) if (path / "sweep.json").is_file()]
    paths = dashboards.write(folder, sweeps, ray_files=[dashboards.ray_file()], prometheus_url=prometheus_url)
    config, grafana = paths[0], paths[0].parent / "grafana"
    commands = [
        f"prometheus --config.file={shlex.quote(str(config))} --web.listen-address=127.0.0.1:9090 "
        f"--storage.tsdb.path={shlex.quote(str(config.parent / 'prometheus-data'))}",
        f"GF_PATHS_PROVISIONING={shlex.quote(str(grafana / 'provisioning'))} GF_SERVER_HTTP_ADDR=127.0.0.1 "
        "grafana server --homepath /usr/share/grafana",
    ]
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in paths], "commands": commands}))
        return
    for path in paths:
        typer.echo(path)
    typer.echo("start them with:\n  " + "\n  ".join(commands), err=True)
    typer.echo("then open http://127.0.0.1:3000/d/raysparse", err=True)


class _Watching:
    """Follows the journal and shows what came: a table on a terminal, a line per event elsewhere."""

    def __init__(self, results: Path, as_json: bool) -> None:
        from rich.console import Console

        from raysparse.sweep import folder
        from raysparse.sweep.board import Board
        from raysparse.sweep.journal import Reader

        self._results, self._as_json = results, as_json
        self._sweep, _ = folder.load(results)
        self._board, self._reader = Board(), Reader(results / "journal.jsonl")
        self._board.folder = results
        self._console = Console()
        self._live = self._console.is_terminal and not as_json
        self._latest: list[tuple[float, str]] = []
        self._begun = time.time()

    def follow(self) -> View:
        """Until no driver runs. -> the sweep as it is then."""
        from rich.live import Live

        if not self._live:
            return self._until_the_end(lambda: None)
        with Live(console=self._console, auto_refresh=False) as live:
            return self._until_the_end(lambda: live.update(self._render(), refresh=True))

    def _until_the_end(self, show: Callable[[], None]) -> View:
        from raysparse.sweep import control
        from raysparse.sweep.views import View

        while True:
            # Looked for before the journal is read: what a driver wrote before it ended is not missed.
            driver = control.driver(self._results, self._board if self._board.last else None)
            for item in self._reader.fresh():
                self._take(item)
            if driver.state != "running":
                self._board.settle()
            show()
            view = View(self._results, self._board, self._sweep, driver)
            if view.state != "running":
                return view
            time.sleep(LOOK_S)

    def _take(self, item: Event) -> None:
        from raysparse.screen import LATEST, event_line, log_lines, print_lines

        self._board.apply(item)
        if self._as_json:
            said = {name: value for name, value in vars(item).items() if value is not None and name != "config"}
            typer.echo(json.dumps(said))
            return
        line = event_line(item, self._board)
        if line is None:
            return
        if not self._live:
            stamp = time.strftime("%m-%d %H:%M:%S", time.localtime(item.time))
            print_lines(self._console, f"{stamp}  {line}", *log_lines(item, self._board))
            return
        self._latest = [*self._latest, (item.time, line)][-LATEST:]
        if item.kind == "failed" and item.time > self._begun:  # above the table, where it stays to be read
            print_lines(self._console, line, *log_lines(item, self._board))

    def _render(self) -> RenderableType:
        from raysparse import space
        from raysparse.screen import headline_of, hints_of, sweep_screen

        headline = (
            f"{self._sweep.name}: {headline_of(self._board, space.trial_count(self._sweep))}{_spent(self._board)}"
        )
        hints = hints_of(self._board)
        return sweep_screen(self._board, headline, self._latest, self._console.height, hints)


def _print_once(view: View) -> None:
    """The table of all trials, what happened last, and what to do."""
    from rich.console import Console

    from raysparse import space
    from raysparse.screen import LATEST, event_line, headline_of, hints_of, sweep_screen
    from raysparse.sweep.board import Board
    from raysparse.sweep.journal import read
    from raysparse.sweep.trial_log import printable

    assert view.sweep is not None
    lines, board = [], Board()
    for item in read(view.results / "journal.jsonl"):
        board.apply(item)
        line = event_line(item, board)
        lines += [(item.time, line)] if line else []
    headline = f"{view.name}: {headline_of(view.board, space.trial_count(view.sweep))}{_spent(view.board)}"
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a pipe has no width of its own
    hints = hints_of(view.board) if view.state == "running" else [_ending(view)]
    console.print(sweep_screen(view.board, headline, lines[-LATEST:], None, []))
    for hint in hints:  # whole: a command that is cut cannot be typed
        console.print(printable(hint), soft_wrap=True, markup=False, highlight=False)


def _spent(board: Board) -> str:
    """`; 3.5 h since it began, 6.9 h of trials`."""
    from raysparse.terminal import duration

    if board.first is None or board.last is None:
        return ""
    return f"; begun {duration(max(time.time() - board.first.time, 0))} ago, {duration(board.busy_s())} of trials"


def _ending(view: View) -> str:
    """Why nothing comes any more, and what to do."""
    failed = sum(row.state == "FAILED" for row in view.board.rows.values())
    retry = "retry" in (view.what_to_do or "")
    todo = sum(row.open for row in view.board.rows.values())
    gone = f" ({view.driver.who} is gone)" if view.driver.who else ""
    words = {
        "running": "running",
        "finished": "finished"
        + f", {failed} failed" * bool(failed)
        + ("; to try them again" if retry else "; its report"),
        "interrupted": f"interrupted with {todo} trials open; go on with",
        "gone": f"no driver runs{gone}, {todo} trials are open; go on with",
        "trials": "no sweep",
    }[view.state]
    return f"{words}: {view.what_to_do}" if view.what_to_do else words

"""What a person sees: bars and tables on a terminal, plain lines elsewhere; progress goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from raysparse.config import TrialConfig
    from raysparse.results import Report
    from raysparse.space import Sweep
    from raysparse.sweep.board import Board, Row
    from raysparse.sweep.journal import Event
    from raysparse.train.reevaluate import Row as EvaluatedRow

LINE_EVERY_S = 10.0  # of progress where there is no terminal


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that shows a bar with a rate and an end time, or a line every ten seconds."""
    console = Console(stderr=True)
    pace = _Pace()
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None, pace="")
            yield lambda done, total: bar.update(task, completed=done, total=total, pace=pace.after(done, total))
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        so_far, now = pace.after(done, total), time.monotonic()
        if now - last >= LINE_EVERY_S:
            last = now
            console.print(f"{what}: {done} of {total}{so_far and ', '}{so_far}", highlight=False)

    yield line


class _Pace:
    """Rate and time left, from the first call on: what was done before it (by a process that was killed) took another
    one's time. A new total is another job: a download, then what is made of it."""

    def __init__(self) -> None:
        self._job: int | None = None
        self._before = 0
        self._start = 0.0

    def after(self, done: int, total: int) -> str:
        now = time.monotonic()
        if total != self._job:
            self._job, self._before, self._start = total, done, now
        rate = (done - self._before) / max(now - self._start, 1e-9)
        if rate <= 0:
            return ""
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{speed}/s, {duration((total - done) / rate)} left"


def report_line(trial: TrialConfig, report: Report) -> str:
    """`step 300/1200  loss 0.31  FID 12.4  density 0.500  4.2 steps/s  ~3 min left`."""
    total = trial.train.steps
    if report.diverged:
        return f"step {report.step}/{total}  diverged: {report.reason}"
    elapsed = report.train_s + report.evaluate_s
    left = elapsed / max(report.step, 1) * (total - report.step)
    numbers = [
        ("loss", report.train_loss, "{:.4f}"),
        ("validation", report.validation_loss, "{:.4f}"),
        (f"FID ({trial.evaluate.extractor})", report.fid, "{:.3f}"),
        ("KID", report.kid, "{:.5f}"),
        ("density", report.density, "{:.4f}"),
        ("replaced", report.topology_changed, "{:.1%}"),
    ]
    shown = "  ".join(f"{name} {form.format(value)}" for name, value, form in numbers if value is not None)
    speed = report.step / report.train_s if report.train_s else 0.0
    return f"step {report.step}/{total}  {shown}  {speed:.1f} steps/s  {duration(left)} left"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_damaged(facts: dict[str, Any]) -> None:
    """On stderr: how many pictures could not be read, and the first ten with the reason."""
    damaged = facts["damaged"]
    if not damaged:
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print(f"{len(damaged)} damaged pictures were left out; all of them are in {facts['folder']}/manifest.json")
    for one in damaged[:_DAMAGED_SHOWN]:
        console.print(f"  {one['id']}: {one['reason']}")
    if len(damaged) > _DAMAGED_SHOWN:
        console.print(f"  and {len(damaged) - _DAMAGED_SHOWN} more")


_DAMAGED_SHOWN = 10


def print_plan(sweep: Sweep, plan: dict[str, Any]) -> None:
    """The output of `raysparse sweep --dry-run`."""
    drawn = plan["search_trials"] - len(plan["trials"])
    table = Table(
        title=f"{plan['name']}: {plan['search_trials']} trials of {plan['steps_per_trial']:,} steps",
        title_justify="left",
    )
    for name in ("trial", "method", "S", "p", "ΔTe", "params active", "test FLOPs", "ratio", "train FLOPs", "ratio"):
        table.add_column(name, justify="left" if name in ("trial", "method") else "right")
    for row in plan["trials"]:
        settings = [row[name] for name in ("sparsity", "prune_ratio", "update_interval")]
        table.add_row(
            row["trial_id"],
            row["method"],
            *("" if value is None else f"{value:g}" for value in settings),
            f"{row['params_active']:,}",
            f"{row['flops_inference_true']:.3e}",
            f"{row['flops_inference_true'] / row['flops_inference_dense_true']:.3f}",
            f"{row['flops_train_true']:.3e}",
            f"{row['flops_train_true'] / row['flops_train_dense_true']:.3f}",
        )
    console = _wide_console()
    console.print(table)
    if drawn > 0:
        console.print(f"and {drawn} more that {sweep.search.sampler if sweep.search else ''} draws as it learns")
    points = plan["mean_points"]
    length = "" if points is None else f" ({points:.1f} points a sketch on average)"
    console.print(
        f"confirm: {plan['confirm_trials']} more trials at full budget on fresh seeds\n"
        f"measured here: {plan['step_s']:.3f} s a step, {duration(plan['evaluation_s'])} of sampling an evaluation"
        f"{length}, {plan['concurrent']} at a time\n"
        f"estimated: {plan['hours_full']:.2f} h if every trial runs to its end, about {plan['hours_asha']:.2f} h with "
        "early stopping, on a machine like this one",
        highlight=False,
    )


def _wide_console() -> Console:
    # A pipe has no width of its own; 80 columns would cut the numbers.
    return Console(width=None if Console().is_terminal else 140)


def print_cost(base: TrialConfig, rows: Sequence[dict[str, Any]]) -> None:
    """The table of `raysparse cost`; the first row is dense and every ratio is to it."""
    dense = rows[0]
    title = f"{base.model.name} {base.model.options or ''}: {dense['params_total']:,} parameters".replace("  ", " ")
    table = Table(title=title, title_justify="left", caption_justify="left", caption=_cost_notes(base, dense))
    for name in (
        "S",
        "params active",
        "ratio",
        "FLOPs ratio",
        "test FLOPs, paper",
        "true",
        "train FLOPs, paper",
        "true",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['sparsity']:.2f}",
            f"{row['params_active']:,}",
            f"{row['params_active'] / dense['params_total']:.4f}",
            f"{row['flops_inference_true'] / dense['flops_inference_true']:.4f}",
            *(f"{row[name]:.4e}" for name in _COSTS),
        )
    _wide_console().print(table)


_COSTS = ("flops_inference_paper", "flops_inference_true", "flops_train_paper", "flops_train_true")


def _cost_notes(base: TrialConfig, dense: dict[str, Any]) -> str:
    return (
        f"test: one sample, {base.evaluate.ddim_steps} DDIM steps; train: {base.train.steps:,} steps of "
        f"{base.train.batch_size} examples. paper: as the papers print it; true: 2 per multiply-add, with the batch."
    )


def print_evaluations(rows: Sequence[EvaluatedRow]) -> None:
    """The table of `raysparse evaluate`: a row per model, a FID for each number of steps."""
    steps = sorted({(row.ddim_steps, row.network_calls) for row in rows})
    table = Table(
        title="FID (KID) of the averaged weights, by DDIM steps and (where it differs) calls of the network",
        title_justify="left",
    )
    for name in ("trial", "method", "S", "seed", "step"):
        table.add_column(name, justify="left" if name in ("trial", "method") else "right")
    for asked, calls in steps:
        table.add_column(str(asked) if asked == calls else f"{asked} ({calls} calls)", justify="right")
    found = {(row.checkpoint, row.ddim_steps): row for row in rows}
    for row in {row.checkpoint: row for row in rows}.values():
        values = [found.get((row.checkpoint, asked)) for asked, _ in steps]
        table.add_row(
            row.trial_id,
            row.method,
            f"{row.sparsity:g}",
            str(row.seed),
            f"{row.step:,}",
            *("" if value is None else f"{value.fid:.2f} ({value.kid:.4f})" for value in values),
        )
    _wide_console().print(table)


class SweepDisplay:
    """Shows a sweep as it goes, through `on_event`: a live table on a terminal, a line per event elsewhere."""

    def __init__(self, board: Board, total: int) -> None:
        """board: what has happened so far (a resumed sweep's table starts full); total: trials of the search stage."""
        self._board = board
        self._total = total
        self._start = time.monotonic()
        self._done_before = sum(not row.open for row in board.rows.values())
        self._last = ""
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
        self._last = line
        if self._live is None:
            self._console.print(
                f"[{duration(time.monotonic() - self._start)}] {line}", markup=False, highlight=False, soft_wrap=True
            )

    def _render(self) -> RenderableType:
        rows = list(self._board.rows.values())
        # What runs is at the bottom, nearest to the prompt; old rows leave at the top when the window is small.
        shown = sorted(rows, key=lambda row: _ORDER.index(row.state))[-max(self._console.height - 6, 5) :]
        table = Table(title=self._headline(), title_justify="left")
        for name, justify in _COLUMNS:
            table.add_column(name, justify=justify, no_wrap=True)
        for row in shown:
            table.add_row(*_cells(row), style=_STYLES.get(row.state))
        return Group(table, Text(self._last, overflow="ellipsis", no_wrap=True))

    def _headline(self) -> str:
        counts = ", ".join(f"{count} {state.lower()}" for state, count in sorted(self._board.counts().items()))
        stage = self._board.stage or "starting"
        elapsed = time.monotonic() - self._start
        planned = f"{len(self._board.of_stage('search'))} of {self._total} trials planned"
        return f"{stage}: {planned}; {counts}; {duration(elapsed)}"


_ORDER = ("FAILED", "STOPPED", "COMPLETED", "PENDING", "RUNNING")
_STYLES = {"FAILED": "red", "STOPPED": "dim", "RUNNING": "bold"}
_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("trial", "left"), ("stage", "left"), ("method", "left"), ("S", "right"), ("p", "right"), ("ΔTe", "right"),
    ("seed", "right"), ("step", "right"), ("FID", "right"), ("state", "left"),
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    settings = [row.setting(name) for name in ("sparsity", "prune_ratio", "update_interval")]
    return [
        row.trial_id,
        row.stage,
        row.method,
        *("" if value is None else f"{value:g}" for value in settings),
        str(row.seed),
        f"{row.step}/{row.total_steps}",
        "" if row.fid is None else f"{row.fid:.3f}",
        row.state.lower(),
    ]


def event_line(item: Event, board: Board) -> str | None:
    """One event in words; None for what nobody needs to read."""
    row = board.rows.get(item.trial_id or "")
    name = _name(row) if row else item.trial_id or ""
    fid = "" if item.fid is None else f", FID {item.fid:.3f}"
    match item.kind:
        case "planned" | "repeated":
            return None
        case "stage":
            return f"== {item.stage}" + (f": {item.reason}" if item.reason else "")
        case "started":
            return f"started    {name}" + (f" from step {item.step}" if item.step else "")
        case "report":
            return f"report     {name}: step {item.step}/{row.total_steps if row else '?'}{fid}"
        case "stopped":
            return f"stopped    {name} at step {item.step}{fid}" + (f" ({item.reason})" if item.reason else "")
        case "completed":
            return f"completed  {name}{fid}"
        case "failed":
            return f"FAILED     {name}: {item.reason}"
        case "chosen":
            return f"chosen     {name}: {item.reason}"
        case _:
            return item.kind + (f": {item.reason}" if item.reason else "")


def _name(row: Row) -> str:
    settings = (("S", "sparsity"), ("p", "prune_ratio"), ("ΔTe", "update_interval"))
    shown = [f"{sign}={row.setting(name):g}" for sign, name in settings if row.setting(name) is not None]
    return " ".join([row.trial_id, *shown, *([f"seed={row.seed}"] if row.stage == "confirm" else [])])

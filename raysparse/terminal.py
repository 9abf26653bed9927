"""What a person sees: bars and tables on a terminal, plain lines elsewhere; progress goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from raysparse.config import TrialConfig
    from raysparse.results import Report
    from raysparse.space import Sweep
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
        ("intermediate FID", report.intermediate_fid, "{:.3f}"),
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


def print_left_out(facts: dict[str, Any]) -> None:
    """On stderr: how many files are no pictures by their names; how many pictures could not be read, and the first ten
    with the reason."""
    from raysparse.data.decoding import SUFFIXES

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if others := facts["other_files"]:
        console.print(f"{others} other files were skipped: only {', '.join(sorted(SUFFIXES))} are read as pictures")
    damaged = facts["damaged"]
    if not damaged:
        return
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
    if any(row["others"] for row in plan["trials"]):
        table.add_column(_WRAPS)
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
            *(
                [", ".join(f"{name}={value}" for name, value in row["others"].items())]
                if len(table.columns) > 10
                else []
            ),
        )
    console = _wide_console()
    print_table(table, console)
    for row in plan["trials"]:
        if row["layers_dense"]:
            listed = "; ".join(f"{layer}: {why}" for layer, why in row["layers_dense"].items())
            console.print(f"{row['trial_id']} leaves dense {listed}", markup=False, highlight=False)
    if drawn > 0:
        console.print(f"and {drawn} more that {sweep.search.sampler if sweep.search else ''} draws as it learns")
    points = plan["mean_points"]
    last = plan["last_evaluation_s"]
    last_one = "" if last == plan["evaluation_s"] else f", {duration(last)} the last one of a trial"
    length = "" if points is None else f" ({points:.1f} points a sketch on average)"
    console.print(
        f"confirm: {plan['confirm_trials']} more trials at full budget on fresh seeds\n"
        f"measured here: {plan['step_s']:.3f} s a step, {duration(plan['evaluation_s'])} of sampling an evaluation"
        f"{last_one}{length}, {plan['concurrent']} at a time\n"
        f"estimated: {plan['hours_full']:.2f} h if every trial runs to its end, about {plan['hours_asha']:.2f} h with "
        "early stopping, on a machine like this one",
        highlight=False,
    )
    if plan["caution"]:
        console.print(plan["caution"], highlight=False)


def _wide_console() -> Console:
    # A pipe has no width of its own; 80 columns would cut the numbers.
    return Console(width=None if Console().is_terminal else 140)


def print_table(table: Table, console: Console) -> None:
    """With whole cells: a terminal that is too narrow gets the table without lines, with still less room rows wrap."""
    if Measurement.get(console, console.options.update(max_width=1_000), table).maximum <= console.width:
        console.print(table)
        return
    table.box, table.pad_edge, table.padding = None, False, (0, 1, 0, 0)
    for column in table.columns:
        cells = [str(cell) for cell in column.cells]
        whole = " ".join(cells).split() if column.header == _WRAPS else cells
        column.width = max(cell_len(text) for text in (*str(column.header).split(), *whole))
    least = sum(column.width + 1 for column in table.columns if column.width)
    (console if least <= console.width + 1 else Console(width=least)).print(table)


_WRAPS = "other settings"


def print_cost(base: TrialConfig, rows: Sequence[dict[str, Any]]) -> None:
    """The table of `raysparse cost`; the first row is dense and every ratio is to it."""
    dense = rows[0]
    name = f"{base.model.name} {base.model.options}" if base.model.options else base.model.name
    title = f"{name}: {dense['params_total']:,} parameters"
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
    console = _wide_console()
    print_table(table, console)
    for layer, why in rows[-1]["layers_dense"].items():
        console.print(f"{layer} stays dense: {why}", markup=False)
    for layer in rows[-1]["layers_by_element"]:
        console.print(f"{layer} is masked by element: it is a convolution with a kernel", markup=False)


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
    print_table(table, _wide_console())

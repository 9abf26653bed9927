"""What `raysparse ls, show, diff` print: tables on stdout, whole also in a pipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysparse.screen import TrialTable, intermediate_hint, intermediate_words, print_lines
from raysparse.sweep.trial_log import printable
from raysparse.terminal import duration, print_table

if TYPE_CHECKING:
    from raysparse.sweep.board import Row

Facts = dict[str, Any]
STYLES = {"running": "bold", "finished": "green", "interrupted": "yellow", "gone": "red", "damaged": "red"}
WORDS = {"gone": "its driver was killed", "trials": "trials without a sweep"}
TRIAL_STYLES = {"FAILED": "red", "COMPLETED": "green", "RUNNING": "bold"}


def print_sweeps(sweeps: Sequence[Facts]) -> None:
    """A line per sweep, the best of each method under it, and what to do."""
    console = _console()
    for sweep in sweeps:
        if sweep["state"] == "damaged":
            console.print(
                Text(printable(f"{sweep['results']}  damaged: {sweep['reason']}"), style="red"), soft_wrap=True
            )
            continue
        ago = f", {_ago(sweep['last_event'])} ago" if sweep["last_event"] else ""
        head = Text.assemble(
            (sweep["results"], "bold"),
            "  ",
            (str(WORDS.get(sweep["state"], sweep["state"])), STYLES.get(sweep["state"], "")),
            ago,
        )
        console.print(head, soft_wrap=True)
        print_lines(console, f"    {_counts(sweep)}")
        for line in best_lines(sweep["best"], _driven(sweep)):
            print_lines(console, f"    {line}")
        if sweep["what_to_do"]:
            print_lines(console, f"    next: {sweep['what_to_do']}")


def print_trials(sweep: Facts, rows: Sequence[Row]) -> None:
    """A line per trial, the best of each method, and what to do."""
    console = _console()
    console.print(
        Text(f"{sweep['name']}: {WORDS.get(sweep['state'], sweep['state'])}; {_counts(sweep)}", style="bold"),
        soft_wrap=True,
    )
    console.print(TrialTable(rows))
    print_lines(console, *intermediate_hint(rows))
    for line in (*best_lines(sweep["best"], _driven(sweep)), *front_lines(sweep["front"])):
        print_lines(console, line)
    if sweep["what_to_do"]:
        print_lines(console, f"next: {sweep['what_to_do']}")


def front_lines(front: Sequence[Facts]) -> list[str]:
    """`on the Pareto front: rigl-a1b2c3d4e5, fid 12.3, flops_inference 1.2e+09`."""
    shown = [[f"{name} {value:.4g}" for name, value in one.items() if name != "trial_id"] for one in front]
    return [
        f"on the Pareto front: {', '.join([one['trial_id'], *values])}"
        for one, values in zip(front, shown, strict=True)
    ]


def best_lines(best: Sequence[Facts], driven: bool = True) -> list[str]:
    """`best of rigl (search): FID 12.3, rigl-a1b2c3d4e5`; FIDs of other protocols are marked, not compared.

    driven: somebody runs what is not at its end.
    """
    lines = []
    for one in best:
        seeds = len(one["fids"])
        mean = f" on average of {seeds} seeds ({min(one['fids']):.3f} to {max(one['fids']):.3f})" if seeds > 1 else ""
        how = "" if one["state"] == "COMPLETED" else f" at step {one['step']}, {_state(one['state'], driven)}"
        other = f"; measured in way {one['protocol']}" if one["protocol"] else ""
        fid = f"FID {one['fid']:.3f}" if one["fid"] is not None else f"intermediate FID {one['intermediate_fid']:.3f}"
        trials = one["trials"][0] + (f" and {seeds - 1} more" if seeds > 1 else "")
        lines.append(f"best of {one['method']} ({one['stage']}): {fid}{mean}, {trials}{how}{other}")
    return lines


def print_trial(page: Facts) -> None:
    """One trial from top to bottom: what it is, what happened, why, what to do."""
    console = _console()
    state = page["state"] if page["state"] == "FAILED" else page["state"].lower()
    why = printable(f": {page['reason']}") if page["reason"] else ""
    console.print(
        Text.assemble((page["trial_id"], "bold"), "  ", (f"{state}{why}", TRIAL_STYLES.get(page["state"], ""))),
        soft_wrap=True,
    )
    settings = ", ".join(f"{name} {value}" for name, value in page["point"].items())
    print_lines(console, f"{page['stage']}; {settings}; seed {page['seed']}")
    protocol = page["protocol"]
    if protocol:
        print_lines(
            console,
            f"FID: {protocol['extractor']}, {protocol['generated']} samples of {protocol['ddim_steps']} DDIM steps "
            f"against {protocol['reference_examples']} examples",
        )
    if page["intermediate_protocol"]:
        print_lines(console, intermediate_words(page["intermediate_protocol"]))
    if page["reports"]:
        print_table(_course(page), console)
    for item in page["events"]:
        where = "after the report of" if item["kind"] == "started" else "at"  # it goes on there or a little later
        step = f" {where} step {item['step']}" if item["step"] else ""
        print_lines(
            console, f"{_local(item['time'])}  {item['kind']}{step}" + (f": {item['reason']}" * bool(item["reason"]))
        )
    if page["log"]:
        console.print(Text(f"last lines of {page['log_file'] or 'its error'}:", style="bold"), soft_wrap=True)
        print_lines(console, *(f"    | {line}" for line in page["log"]))
    for name, title in (("samples", "samples"), ("checkpoint", "checkpoint"), ("command", "train it again")):
        if page[name]:
            print_lines(console, f"{title + ':':<15} {page[name]}")
    if page["what_to_do"]:
        print_lines(console, f"{'next:':<15} {page['what_to_do']}")


def _course(page: Facts) -> Table:
    """A line per report; the rung that it counted at, with the place among all that have been there."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    early = ("intermediate FID",) if page["intermediate_protocol"] else ()
    for name in ("step", "FID", *early, "KID", "loss", "validation", "density", "replaced", "time"):
        table.add_column(name, justify="right")
    table.add_column("rung, place there now")
    rungs = {rung["rung"]: rung for rung in page["rungs"]}
    for report in page["reports"]:
        compared = report.get("intermediate_fid" if early else "fid")
        reached = [rung for rung in rungs.values() if rung["fid"] == compared and rung["rung"] <= report["step"]]
        for rung in reached:
            rungs.pop(rung["rung"])
        spent = sum(report.get(name) or 0 for name in ("train_s", "compile_s", "evaluate_s"))
        table.add_row(
            f"{report['step']:,}",
            _number(report.get("fid"), ".3f"),
            *(_number(compared, ".3f") for _ in early),
            _number(report.get("kid"), ".5f"),
            _number(report.get("train_loss"), ".4f"),
            _number(report.get("validation_loss"), ".4f"),
            _number(report.get("density"), ".4f"),
            _number(report.get("topology_changed"), ".1%"),
            duration(spent) if spent else "",
            "; ".join(f"{rung['rung']:g}: {rung['place']} of {rung['of']}" for rung in reached),
        )
    return table


def print_difference(found: Facts) -> None:
    """Two columns: settings that differ, then FIDs."""
    a, b = found["trials"]
    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for trial in (a, b):
        table.add_column(trial["trial_id"], overflow="fold")
    for name, values in found["settings"].items():
        table.add_row(name, *("-" if value is None else str(value) for value in values))
    table.add_row("state", a["state"].lower(), b["state"].lower())
    if not found["comparable"]:
        console.print(table)
        if found["protocols_differ_in"] is None:
            print_lines(console, "no FIDs to compare: one of the two has no records yet")
        else:
            names = ", ".join(
                f"{name} ({values[0]} and {values[1]})" for name, values in found["protocols_differ_in"].items()
            )
            print_lines(console, f"their FIDs are not comparable, the protocols differ: {names}")
        return
    for line in found["fids"]:
        left, right = line["fids"]
        change = "" if left is None or right is None else f"  ({right - left:+.3f})"
        name = "intermediate FID" if line["of"] == "intermediate_fid" else "FID"
        at = "" if line["step"] is None else f" at step {line['step']:,}"
        table.add_row(f"{name}{at}", _number(left, ".3f"), _number(right, ".3f") + change)
    console.print(table)


def _counts(sweep: Facts) -> str:
    trials = [f"{count} {_state(state, _driven(sweep))}" for state, count in sweep["trials"].items()]
    counts = ", ".join(trials) or "no trial begun"
    stage = f"{sweep['stage']}: " if sweep["stage"] else ""
    spent = f"; {sweep['trial_hours']:.2f} h of trials" if sweep["trial_hours"] else ""
    return stage + counts + spent + (f", {sweep['gpu_hours']:.2f} GPU hours" if sweep["gpu_hours"] else "")


def _driven(sweep: Facts) -> bool:
    return sweep["state"] in ("running", "trials")


def _state(state: str, driven: bool) -> str:
    return "open" if state == "RUNNING" and not driven else state.lower()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ago(iso: str) -> str:
    return duration(max(time.time() - datetime.fromisoformat(iso).timestamp(), 0))


def _local(iso: str) -> str:
    return datetime.fromisoformat(iso).astimezone().strftime("%m-%d %H:%M:%S")


def _console() -> Console:
    # A pipe has no width of its own; 80 columns would cut the numbers.
    return Console(width=None if Console().is_terminal else 140, highlight=False)

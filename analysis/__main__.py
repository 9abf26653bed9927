"""`python -m analysis RESULTS [RESULTS ...]`: write the report of results folders and print the main tables.

`python -m analysis compare A B`: hold two sweeps against each other.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from analysis import tables
from analysis.markup import markdown
from raysparse.errors import UsageError
from raysparse.files import write_text

ROWS = 40  # of the main table, on the terminal


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for the user's mistakes."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given[:1] == ["compare"]:
            _compare(_compare_parser().parse_args(given[1:]))
        else:
            _report(_parser().parse_args(given))
    except UsageError as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    except OSError as error:  # no permission, a file where the folder should be, a full disk
        _say(f"error: cannot write the report: {error}", sys.stderr)
        return 2
    return 0


def _report(options: argparse.Namespace) -> None:
    from analysis import drawing
    from analysis.report import Report

    with drawing.helper() as helper:
        report = Report.of(*options.results)
        _warn(report.warnings)
        folders = report.records.folders
        output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report"
        page = report.write(output, helper)
    if options.json:
        _say(json.dumps({"report": str(page)} | report.summary(), indent=2, ensure_ascii=False, allow_nan=False))
        return
    for section in report.sections:
        if len(report.sections) > 1:
            _say(f"## {markdown(section.title)}\n")
        _say(tables.main(section).markdown(most=ROWS))
    _say(str(page))


def _compare(options: argparse.Namespace) -> None:
    from analysis import compare

    found, warnings = compare.tables(options.a, options.b)
    _warn(warnings)
    for table in found if options.output else []:
        for kind, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            write_text(options.output / f"{table.name}.{kind}", text)
    if options.json:
        _say(json.dumps({"tables": [_plain(table) for table in found], "warnings": warnings}, indent=2,
                        ensure_ascii=False, allow_nan=False))  # fmt: skip
        return
    for table in found:
        _say(f"## {markdown(table.title)}\n\n{table.markdown()}\n{markdown(table.caption)}\n")


def _plain(table: tables.Table) -> dict[str, Any]:
    rows = json.loads(table.frame.to_json(orient="records", double_precision=15))
    return {"title": table.title, "caption": table.caption, "rows": rows}


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}", sys.stderr)


def _say(text: str, stream: TextIO | None = None) -> None:
    (stream or sys.stdout).write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Write what sparsity costs and saves in one or several sweeps: one HTML page, and its tables as "
        "CSV, Markdown and LaTeX. Works while a sweep runs.",
        epilog="`python -m analysis compare A B` holds two sweeps against each other; see its --help.",
    )
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS", help="results folder of a sweep (it holds records/)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where to write; default: RESULTS/report, with several folders ./report",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a summary as JSON instead of the main table")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis compare",
        description="Hold sweep B against sweep A: differences of dense, of each method's best and of every "
        "configuration confirmed in both, with intervals. Refuses where their FIDs were measured under "
        "different protocols.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="results folder of the first sweep")
    parser.add_argument("b", type=Path, metavar="B", help="results folder of the second sweep")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write the tables as CSV, Markdown and LaTeX")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    return parser


if __name__ == "__main__":
    code = main()
    gc.freeze()  # else Python goes through all rows and figures once more as it ends: .4 s of a large report
    sys.exit(code)

"""`python -m analysis RESULTS`: write the report of a results folder and print its main table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TextIO

from analysis import tables
from analysis.markup import markdown
from analysis.report import Report
from raysparse.errors import UsageError

ROWS = 40  # of the main table, on the terminal


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for the user's mistakes."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except UsageError as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    except OSError as error:  # no permission, a file where the folder should be, a full disk
        _say(f"error: cannot write the report: {error}", sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    report = Report.of(options.results)
    for warning in report.warnings:
        _say(f"warning: {warning}", sys.stderr)
    output = options.output or options.results / "report"
    page = report.write(output)
    if options.json:
        _say(json.dumps({"report": str(page)} | report.summary(), indent=2, ensure_ascii=False, allow_nan=False))
        return
    for section in report.sections:
        if len(report.sections) > 1:
            _say(f"## {markdown(f'{section.dataset}, {section.model}, {section.fid_name}')}\n")
        _say(tables.main(section).markdown(most=ROWS))
    _say(str(page))


def _say(text: str, stream: TextIO | None = None) -> None:
    (stream or sys.stdout).write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Write what sparsity costs and saves in a sweep: one HTML page, and its tables as CSV and "
        "Markdown. Works while the sweep runs.",
    )
    parser.add_argument(
        "results", type=Path, metavar="RESULTS", help="the results folder of a sweep (it holds records/)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: RESULTS/report")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON instead of the main table")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""One self-contained page and the tables beside it: `write(results)`."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from analysis import headline, tables, words
from analysis.load import Records, read
from analysis.markup import Html, join, tag
from analysis.parts import Part, parts
from analysis.sections import Section, split
from raysparse.files import write_text

WRITTEN = "files.json"  # names of the files of the last report, so that the next one knows which are its own
OWN = re.compile(r"[a-z0-9_]+(-[0-9a-f]{6})?\.[a-z]+")

RULES = (
    "A trial's result is the FID of its last report at full budget, never the smallest of its reports: the smallest "
    "of many noisy looks is too low.",
    "Only the confirm stage counts as evidence: the winners of the search and the dense baseline, run again at full "
    "budget on several seeds. The search's own run of a winner is not pooled in, for it was picked for being low.",
    "± is the standard deviation over seeds (n − 1). Differences from dense have Welch intervals, widened (Bonferroni) "
    "so that all comparisons of a section hold together. “No difference shown” means that the interval contains "
    "zero; it is not a proof of equality.",
    "FLOPs are counted from layer shapes and densities (Conv, Linear and recurrent weights); seconds are measured on "
    "the machine that ran the sweep, other trials beside it included.",
)


@dataclass(frozen=True)
class Report:
    """A results folder, read and split; what the command line prints comes from here."""

    records: Records
    sections: tuple[Section, ...]

    @classmethod
    def of(cls, *results: Path) -> Report:
        """UsageError where the folders hold no readable record."""
        records = read(*results)
        return cls(records, tuple(split(records)))

    @property
    def warnings(self) -> list[str]:
        return list(self.records.warnings)

    @cached_property
    def parts(self) -> tuple[list[Part], ...]:
        """The parts of each section."""
        return tuple(parts(section) for section in self.sections)

    def write(self, output: Path) -> Path:
        """Tables, then the page (last, so that a page never names tables that are not there); the page's path."""
        texts: dict[str, str] = {}
        for section, found in zip(self.sections, self.parts, strict=True):
            for table in (table for part in found for table in part.tables):
                name = self.table_name(section, table.name)
                texts |= {f"{name}.csv": table.csv(), f"{name}.md": table.markdown(), f"{name}.tex": table.latex()}
        page = self.html()
        for name, text in texts.items():
            write_text(output / name, text)
        write_text(output / "report.html", page)
        # An earlier report may have had other sections: its files must not pass for this one's.
        for name in _written(output) - set(texts):
            (output / name).unlink(missing_ok=True)
        write_text(output / WRITTEN, json.dumps(sorted(texts)))
        return output / "report.html"

    def table_name(self, section: Section, table: str) -> str:
        """`main`, or `main-3fa1c2` where several sections share the folder."""
        return table if len(self.sections) == 1 else f"{table}-{_key(section)}"

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {"warnings": self.warnings, "sections": [headline.summary(section) for section in self.sections]}

    def html(self) -> str:
        """The whole page as text; it makes no request."""
        charts: dict[str, go.Figure] = {}
        body = join(*(_section(self, section, place, charts) for place, section in enumerate(self.sections)))
        title = " · ".join(["raysparse", *sorted({str(name) for name in self.records.trials["sweep"]})[:3]])
        plotly, script = _script(get_plotlyjs()), _script(_asset("page.js"))
        return Template(_asset("page.html")).substitute(
            title=join(title),
            policy=f"script-src {_digest(plotly)} {_digest(script)}",
            style=_asset("page.css"),
            head=_head(self),
            body=body,
            figures=_inline_json({name: _figure_json(chart) for name, chart in charts.items()}),
            plotly=plotly,
            script=script,
        )


def write(results: Path, output: Path | None = None) -> Path:
    """Write the report of a results folder to `output` (default: RESULTS/report) and return the page's path.

    Raises UsageError where there is nothing readable. Everything is written atomically.
    """
    return Report.of(results).write(results / "report" if output is None else output)


def _written(output: Path) -> set[str]:
    """The files that the last report in this folder wrote; nothing where there was none."""
    try:
        names = json.loads((output / WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return (
        {name for name in names if isinstance(name, str) and OWN.fullmatch(name)} if isinstance(names, list) else set()
    )


def _head(report: Report) -> Html:
    trials = report.records.trials
    states = trials["state"].value_counts()
    counts = ", ".join(f"{count} {str(state).lower()}" for state, count in states.items())
    sweeps = words.listed([str(name) for name in trials["sweep"].unique()])
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = [
        tag("p", "raysparse report", class_="kicker"),
        tag("h1", sweeps),
        tag("p", f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {counts}. Written {now}.", class_="meta"),
    ]
    if report.warnings:
        items = [tag("li", warning) for warning in report.warnings]
        head.append(tag("div", tag("p", "Not all records could be read:"), tag("ul", *items), class_="warning"))
    if len(report.sections) > 1:
        head.append(_why_split(report))
    return join(*head)


def _why_split(report: Report) -> Html:
    protocols = [s.protocol | {"model": s.model, "data set": s.dataset, "variant": s.variant} for s in report.sections]
    names = sorted({name for protocol in protocols for name in protocol})
    differ = [name for name in names if len({json.dumps(p.get(name)) for p in protocols}) > 1]
    links = [
        tag(
            "li",
            tag("a", s.title, href=f"#section-{place}"),
            f" ({len(s.trials)} trials)",
        )
        for place, s in enumerate(report.sections)
    ]
    return tag(
        "div",
        tag(
            "p",
            f"These records differ in {words.listed(differ)}, so their FIDs are not comparable: they stand in "
            f"{len(report.sections)} sections, and nothing is ranked or drawn across them.",
        ),
        tag("ul", *links),
        class_="notice",
    )


def _section(report: Report, section: Section, place: int, charts: dict[str, go.Figure]) -> Html:
    body = [_part(report, section, part, place, charts) for part in report.parts[place]]
    heading = tag("h2", section.title)
    return tag(
        "section",
        heading if len(report.sections) > 1 else join(),
        tag("div", *(tag("p", sentence) for sentence in headline.sentences(section)), class_="headline"),
        *body,
        _stamp(report, section),
        id=f"section-{place}",
    )


def _part(report: Report, section: Section, part: Part, place: int, charts: dict[str, go.Figure]) -> Html:
    shown = []
    if part.sentences:
        shown.append(tag("div", tag("h3", part.title), *(tag("p", text) for text in part.sentences), class_="block"))
    if part.figure is not None:
        name = f"{part.name}-{place}"
        charts[name] = part.figure
        label = f"{part.title}. {part.caption}"
        ground = tag("div", class_="plot", data_figure=name, role="img", aria_label=label)
        title = join() if shown else tag("h3", part.title)
        shown.append(tag("figure", title, ground, tag("figcaption", part.caption)))
    return join(*shown, part.pictures, *(_table(report, section, table, part.folded) for table in part.tables))


def _table(report: Report, section: Section, table: tables.Table, folded: bool = False) -> Html:
    name = report.table_name(section, table.name)
    links = [tag("a", kind, href=f"{name}.{kind.lower()}") for kind in ("CSV", "MD", "TEX")]
    spaced = [piece for link in links for piece in (" ", link)]
    title = tag("h3", table.title, tag("span", *spaced[1:], class_="links"))
    if folded:
        inside = tag("details", tag("summary", f"{len(table.frame):,} trials"), table.html())
        return tag("div", title, inside, class_="block")
    return tag("div", title, table.html(), class_="block")


def _stamp(report: Report, section: Section) -> Html:
    """What one needs to judge the numbers and to get them again."""
    pairs = [("model", section.model), ("data set", section.dataset)]
    pairs += [("variant", section.variant)] if section.variant else []
    pairs += [
        (name, value if isinstance(value, str) else json.dumps(value)) for name, value in section.protocol.items()
    ]
    protocol = [join(tag("dt", name), tag("dd", value or words.NONE)) for name, value in pairs]
    versions = [tag("li", _versions(text)) for text in section.trials["versions"].dropna().unique()[:5]]
    rows = [("dense", section.dense), ("best sparse", section.best)]
    settings = [
        tag("details", tag("summary", f"Settings: {name}"), tag("pre", _pretty(section, row)))
        for name, row in rows
        if row
    ]
    commands = [
        *_commands(section),
        f"python -m analysis {shlex.join(str(folder) for folder in report.records.folders)}",
    ]
    return tag(
        "div",
        tag("h3", "Protocol"),
        tag("p", f"Two values of {section.fid_name} compare only where all of this is equal.", class_="caption"),
        tag("dl", *protocol),
        tag("h3", "To get this again"),
        *(tag("pre", command) for command in commands),
        tag("ul", *versions, class_="versions"),
        *settings,
        tag("h3", "How to read the numbers"),
        tag("ul", *(tag("li", rule) for rule in RULES)),
        class_="block stamp",
    )


def _commands(section: Section) -> list[str]:
    """The commands of the records: all where they are few, else those of dense and best."""
    commands = list(section.trials["command"].dropna().unique())
    if len(commands) <= 3:
        return commands
    shown = [row["configuration"] for row in (section.dense, section.best) if row]
    return list(section.trials[section.trials["configuration"].isin(shown)]["command"].dropna().unique()[:3])


def _versions(text: str) -> str:
    try:
        return ", ".join(f"{name} {value}" for name, value in json.loads(text).items())
    except (ValueError, AttributeError):
        return text


def _pretty(section: Section, row: dict[str, Any]) -> str:
    text = str(section.trials[section.trials["configuration"].eq(row["configuration"])]["config"].iloc[0])
    try:
        return json.dumps(json.loads(text), indent=2)
    except ValueError:
        return text


def _key(section: Section) -> str:
    text = json.dumps([section.protocol_text, section.model, section.dataset, section.variant])
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _asset(name: str) -> str:
    return (files("analysis") / name).read_text(encoding="utf-8")


def _script(source: str) -> str:
    """Script text that a page can hold and whose hash a browser will agree with."""
    return re.sub(r"</(?=script)", r"<\\/", source.replace("\r\n", "\n").replace("\r", "\n"), flags=re.IGNORECASE)


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _figure_json(chart: go.Figure) -> Any:
    """The figure as data; a hover text per point becomes runs `[text, count]`: a trial repeats it at every report."""
    data = json.loads(chart.to_json())
    for trace in data["data"]:
        if isinstance(trace.get("text"), list):
            trace["text"] = [[text, len(list(run))] for text, run in itertools.groupby(trace["text"])]
    return data


def _inline_json(data: Any) -> str:
    """JSON that can stand in a <script> element: no `<` is left that could end it."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

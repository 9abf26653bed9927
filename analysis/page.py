"""The page of a report: one HTML text that holds all it shows and makes no request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from string import Template

from plotly.offline import get_plotlyjs

from analysis import headline, stamp, table_html, vector, words
from analysis.load import Records
from analysis.markup import Html, join, tag
from analysis.parts import Part
from analysis.payload import Payload, inline
from analysis.sections import Section
from analysis.tables import Table

SCRIPTS = ("filters.js", "plots.js", "tables.js")  # one script, in this order
HEIGHT_PX = 440  # of a figure that does not say


@dataclass(frozen=True)
class Chapter:
    """A section as the page shows it. suffix: what the names of its files end with."""

    section: Section
    parts: list[Part]
    suffix: str


@dataclass
class _Data:
    """What the page's scripts read: shared arrays, and a script element per figure and per table's CSV."""

    beside: bool  # the figures lie beside the page as files
    payload: Payload = field(default_factory=Payload)
    elements: list[Html] = field(default_factory=list)

    def add(self, name: str, value: object) -> None:
        self.elements.append(_json(name, value))


def html(
    records: Records, chapters: Sequence[Chapter], above: Sequence[Part], warnings: Sequence[str], beside: bool
) -> str:
    """The page. above: parts before all chapters; warnings: what is missing; beside: figures are files too."""
    data = _Data(beside)
    body = [_part(part, part.name, "", data) for part in above]
    body += [_chapter(records, chapter, place, len(chapters), data) for place, chapter in enumerate(chapters)]
    shared = [_json("facets", data.payload.facets), _json("arrays", data.payload.arrays)]
    title = " · ".join(["raysparse", *sorted({str(name) for name in records.trials["sweep"]})[:3]])
    scripts = [_script(text) for text in (_asset("theme.js"), get_plotlyjs(), "".join(map(_asset, SCRIPTS)))]
    return Template(_asset("page.html")).substitute(
        title=join(title),
        policy=f"script-src {' '.join(map(_digest, scripts))}",
        style=_asset("page.css"),
        head=_head(records, [chapter.section for chapter in chapters], warnings),
        body=join(*body),
        data=join(*shared, *data.elements),
        theme=scripts[0],
        plotly=scripts[1],
        script=scripts[2],
    )


def _head(records: Records, sections: Sequence[Section], warnings: Sequence[str]) -> Html:
    trials = records.trials
    states = trials["state"].value_counts()
    counts = ", ".join(f"{count} {str(state).lower()}" for state, count in states.items())
    sweeps = words.listed([str(name) for name in trials["sweep"].unique()])
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = [
        tag("p", "raysparse report", class_="kicker"),
        tag("h1", sweeps),
        tag("p", f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {counts}. Written {now}.", class_="meta"),
    ]
    if warnings:
        items = [tag("li", warning) for warning in warnings]
        head.append(tag("div", tag("p", "Something is missing:"), tag("ul", *items), class_="warning"))
    if len(sections) > 1:
        head.append(_why_split(sections))
    return join(*head)


def _why_split(sections: Sequence[Section]) -> Html:
    protocols = [s.protocol | {"model": s.model, "data set": s.dataset, "variant": s.variant} for s in sections]
    names = sorted({name for protocol in protocols for name in protocol})
    differ = [name for name in names if len({json.dumps(p.get(name)) for p in protocols}) > 1]
    links = [
        tag("li", tag("a", s.title, href=f"#section-{place}"), f" ({len(s.trials)} trials)")
        for place, s in enumerate(sections)
    ]
    reason = (
        f"These records differ in {words.listed(differ)}, so their FIDs are not comparable: they stand in "
        f"{len(sections)} sections, and nothing is ranked or drawn across them."
    )
    return tag("div", tag("p", reason), tag("ul", *links), class_="notice")


def _chapter(records: Records, chapter: Chapter, place: int, of: int, data: _Data) -> Html:
    section = chapter.section
    return tag(
        "section",
        tag("h2", section.title) if of > 1 else join(),
        tag("div", *(tag("p", sentence) for sentence in headline.sentences(section)), class_="headline"),
        _contents(chapter.parts, place),
        *(_part(part, f"{part.name}-{place}", chapter.suffix, data) for part in chapter.parts),
        stamp.html(section, records.folders, f"protocol-{place}"),
        id=f"section-{place}",
    )


def _contents(parts: list[Part], place: int) -> Html:
    links = [(part.title, f"#{part.name}-{place}") for part in parts] + [("Protocol", f"#protocol-{place}")]
    items = [tag("li", tag("a", title, href=href)) for title, href in links]
    return tag("nav", tag("ol", *items), class_="contents", aria_label="Contents")


def _part(part: Part, anchor: str, suffix: str, data: _Data) -> Html:
    shown = [tag("p", text) for text in part.sentences]
    if part.figure is not None:
        data.add(f"figure-{anchor}", data.payload.figure(part.figure))
        shown.append(_figure(part, anchor, f"figures/{part.name}{suffix}" if data.beside else None))
    if part.pictures:
        shown.append(part.pictures)
    alone = len(part.tables) == 1 and part.tables[0].title == part.title
    shown += [_table(table, f"{table.name}{suffix}", not alone, part.folded, data) for table in part.tables]
    return tag("section", tag("h3", part.title), *shown, class_="part", id=anchor)


def _figure(part: Part, anchor: str, path: str | None) -> Html:
    """The place where plots.js draws, and the caption."""
    figure = part.figure
    assert figure is not None
    ground = tag(
        "div", class_="plot", data_figure=anchor, role="img", aria_label=f"{part.title}. {part.caption}",
        style=f"height:{figure.layout.height or HEIGHT_PX:g}px",
    )  # fmt: skip
    caption: list[str] = [part.caption]
    if not any(getattr(trace, "customdata", None) is not None for trace in figure.data):
        caption.append(tag("span", " Not filtered: it is made of all trials.", class_="unfiltered", hidden=""))
    if path is not None:
        links = [tag("a", kind.upper(), href=f"{path}.{kind}") for kind in vector.FORMATS]
        caption.append(tag("span", " ", links[0], " ", links[1], class_="links"))
    return tag("figure", ground, tag("figcaption", *caption))


def _table(table: Table, name: str, titled: bool, folded: bool, data: _Data) -> Html:
    data.add(f"csv-{name}", table.csv())
    save = tag("button", "CSV", type="button", data_csv=name, title=f"Save {name}.csv: all rows, all digits")
    links = [piece for kind in ("MD", "TEX") for piece in (" ", tag("a", kind, href=f"{name}.{kind.lower()}"))]
    tools = tag("p", tag("span", class_="count", role="status"), save, *links, class_="tools links")
    shown = table_html.html(table, data.payload)
    if folded:
        shown = tag("details", tag("summary", f"Show {len(table.frame):,} rows"), shown)
    return tag("div", tag("h4", table.title) if titled else join(), tools, shown, class_="block")


def _json(name: str, value: object) -> Html:
    return Html(f'<script type="application/json" id="{join(name)}">{inline(value)}</script>\n')


def _asset(name: str) -> str:
    return (files("analysis") / "web" / name).read_text(encoding="utf-8")


def _script(source: str) -> str:
    """Script text that a page can hold and whose hash a browser will agree with."""
    return re.sub(r"</(?=script)", r"<\\/", source.replace("\r\n", "\n").replace("\r", "\n"), flags=re.IGNORECASE)


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"

"""A table on the page: headings that sort, rows that the page's filter can hide."""

from __future__ import annotations

from analysis.markup import Html, join, tag
from analysis.payload import Payload
from analysis.tables import Column, Row, Table

LONG = 32  # characters; longer words break into lines
FACETS = ("method", "sparsity", "prune_ratio")  # the columns of a frame that the filter goes by


def html(table: Table, payload: Payload) -> Html:
    """The table in a box that scrolls on its own, its caption below."""
    if table.frame.empty:
        return tag("p", table.nothing, class_="nothing")
    kinds = ["number" if column.numeric else "words" for column in table.columns]
    head = [
        tag("th", tag("button", column.heading, type="button"), scope="col", class_=kind)
        for column, kind in zip(table.columns, kinds, strict=True)
    ]
    filtered = set(FACETS) <= set(table.frame.columns)
    body = []
    for row in table.rows:
        cells = [_cell(column, row, kind) for column, kind in zip(table.columns, kinds, strict=True)]
        facet = str(payload.facet(*(row[name] for name in FACETS))) if filtered else None
        body.append(tag("tr", *cells, data_facet=facet))
    drawn = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
    box = tag("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=table.title)
    return join(box, tag("p", table.caption, class_="caption"))


def _cell(column: Column, row: Row, kind: str) -> Html:
    text = column.text(row)
    bold, underlined = column.marks(row)
    shown = tag("u", text) if underlined else join(text)
    shown = tag("strong", shown) if bold else shown
    return tag("td", shown, class_=f"{kind} long" if len(text) > LONG and kind == "words" else kind)

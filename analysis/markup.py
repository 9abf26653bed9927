"""HTML and Markdown in which text stays text: whatever is not `Html` is escaped on the way in."""

from __future__ import annotations

import html
import re

VOID = frozenset({"br", "hr", "img", "meta"})


class Html(str):
    """Markup made by this module; the one kind of string that is put into a page as it is."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | None) -> Html:
    """`<name ...>children</name>`; in attribute names a trailing `_` goes and others become `-`; None: left out."""
    pairs = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = f"<{name}{''.join(pairs)}>"
    return Html(opening if name in VOID else f"{opening}{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Children one after the other, plain strings escaped."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child, quote=True) for child in children))


def plain(text: str) -> str:
    """Text for plotly, which reads a few tags and entities in names, labels and hover texts."""
    return html.escape(text, quote=False)


def markdown(text: str) -> str:
    """Text for a cell of a Markdown table: no line break, no column, no tag, no link, no emphasis."""
    return re.sub(r"([\\|`*\[\]<>])", r"\\\1", re.sub(r"\s+", " ", text).strip())

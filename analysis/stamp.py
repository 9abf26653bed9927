"""What one needs to judge a section's numbers and to get them again: protocol, commands, versions, settings, rules."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis import words
from analysis.markup import Html, join, tag
from analysis.sections import Section

RULES = (
    "A trial's result is the FID of its last report at full budget, never the smallest of its reports: the smallest "
    "of many noisy looks is too low.",
    "Only the confirm stage counts as evidence: the winners of the search and the dense baseline, run again at full "
    "budget on several seeds. The search's own run of a winner is not pooled in, for it was picked for being low.",
    "± is the standard deviation over seeds (n − 1). Differences from dense have Welch intervals, widened (Bonferroni) "
    "so that all comparisons of a section hold together: of several dense configurations the lowest judges, and each "
    "counts. “No difference shown” means that the interval contains zero; it is not a proof of equality.",
    "FLOPs are counted from layer shapes and densities (Conv, Linear and recurrent weights); seconds are measured on "
    "the machine that ran the sweep, other trials beside it included.",
)


def html(section: Section, folders: Sequence[Path], anchor: str) -> Html:
    """The last block of a section."""
    pairs = [("model", section.model), ("data set", section.dataset)]
    pairs += [("variant", section.variant)] if section.variant else []
    pairs += [
        (name, value if isinstance(value, str) else json.dumps(value)) for name, value in section.protocol.items()
    ]
    protocol = [join(tag("dt", name), tag("dd", value or words.NONE)) for name, value in pairs]
    early = section.early_protocol or {}
    early_pairs = [join(tag("dt", name), tag("dd", json.dumps(value))) for name, value in early.items()]
    versions = [tag("li", _versions(text)) for text in section.trials["versions"].dropna().unique()[:5]]
    rows = [("dense", section.dense), ("best sparse", section.best)]
    settings = [
        tag("details", tag("summary", f"Settings: {name}"), tag("pre", _pretty(section, row)))
        for name, row in rows
        if row
    ]
    commands = [*_commands(section), f"python -m analysis {shlex.join(str(folder) for folder in folders)}"]
    return tag(
        "div",
        tag("h3", "Protocol", id=anchor),
        tag("p", f"Two values of {section.fid_name} compare only where all of this is equal.", class_="caption"),
        tag("dl", *protocol),
        *([tag("h3", f"Protocol of the {section.early_name}"), tag("dl", *early_pairs)] if early else []),
        tag("h3", "To get this again"),
        *(tag("pre", command, tabindex="0") for command in commands),
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

"""One self-contained page, the tables and the figures beside it: `write(results)`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from analysis import drawing, headline, page, vector
from analysis.load import Records, read
from analysis.parts import Part, overall, parts
from analysis.sections import Section, split
from raysparse.files import atomic_path, write_text

WRITTEN = "files.json"  # names of the files of the last report, so that the next one knows which are its own
OWN = re.compile(r"(figures/)?[a-z0-9_]+(-[0-9a-f]{6})?\.[a-z]+")


class Contents(NamedTuple):
    """What the page and its tables show."""

    overall: list[Part]  # above all sections, where there are several
    chapters: list[page.Chapter]  # of each section


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
        """What could not be read, and what will be missing."""
        return [*self.records.warnings, *filter(None, [vector.missing()])]

    def write(self, output: Path, helper: drawing.Helper | None) -> Path:
        """Tables, figures, then the page (last, so that it never names files that are not there); the page's path.

        helper: of `drawing.helper()`; None: the figures are in the page alone, and `warnings` says so.
        """
        output.mkdir(parents=True, exist_ok=True)  # a file in its place is found out before the work, not after
        contents = self._contents(lambda name, part: _draw(helper, name, part))
        files, text = self._tables(contents), self._page(contents)
        drawn = helper.finish() if helper else {}
        files |= {f"{name}.{kind}": content for name, figure in drawn.items() for kind, content in figure.items()}
        for name, content in files.items():
            with atomic_path(output / name) as temporary:
                temporary.write_bytes(content)
        write_text(output / "report.html", text)
        # An earlier report may have had other sections: its files must not pass for this one's.
        for name in _written(output) - set(files):
            (output / name).unlink(missing_ok=True)
        write_text(output / WRITTEN, json.dumps(sorted(files)))
        return output / "report.html"

    def html(self) -> str:
        """The whole page as text; it makes no request."""
        return self._page(self._contents(lambda name, part: None))

    def suffix(self, section: Section) -> str:
        """What the names of a section's files end with: nothing, or `-3fa1c2` where several share the folder."""
        return "" if len(self.sections) == 1 else f"-{_key(section)}"

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {"warnings": self.warnings, "sections": [headline.summary(section) for section in self.sections]}

    def _contents(self, seen: Callable[[str, Part], None]) -> Contents:
        """All parts. seen: told each as soon as it is made, with the name of its figure's files without an ending."""
        chapters = []
        for section in self.sections:
            chapters.append(page.Chapter(section, [], self.suffix(section)))
            for part in parts(section):
                chapters[-1].parts.append(part)
                seen(f"figures/{part.name}{chapters[-1].suffix}", part)
        return Contents(list(overall(self.sections)), chapters)

    def _page(self, contents: Contents) -> str:
        beside = vector.missing() is None
        return page.html(self.records, contents.chapters, contents.overall, self.warnings, beside=beside)

    def _tables(self, contents: Contents) -> dict[str, bytes]:
        texts: dict[str, str] = {}
        named = [("", contents.overall), *((chapter.suffix, chapter.parts) for chapter in contents.chapters)]
        for suffix, found in named:
            for table in (table for part in found for table in part.tables):
                name = f"{table.name}{suffix}"
                texts |= {f"{name}.csv": table.csv(), f"{name}.md": table.markdown(), f"{name}.tex": table.latex()}
        return {name: text.encode() for name, text in texts.items()}


def _draw(helper: drawing.Helper | None, name: str, part: Part) -> None:
    if helper and part.figure is not None:
        helper.add(name, vector.describe(part.figure))


def write(results: Path, output: Path | None = None) -> Path:
    """Write the report of a results folder to `output` (default: RESULTS/report) and return the page's path.

    Raises UsageError where there is nothing readable. Everything is written atomically.
    """
    with drawing.helper() as helper:
        return Report.of(results).write(results / "report" if output is None else output, helper)


def _written(output: Path) -> set[str]:
    """The files that the last report in this folder wrote; nothing where there was none."""
    try:
        names = json.loads((output / WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return (
        {name for name in names if isinstance(name, str) and OWN.fullmatch(name)} if isinstance(names, list) else set()
    )


def _key(section: Section) -> str:
    text = json.dumps([section.protocol_text, section.model, section.dataset, section.variant])
    return hashlib.sha256(text.encode()).hexdigest()[:6]

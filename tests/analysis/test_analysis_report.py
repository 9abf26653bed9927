from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import PROTOCOL, Folder, facts, fill_sweep, hostile, picture

from analysis import report, vector
from analysis.__main__ import main
from analysis.report import Report
from raysparse.errors import UsageError


class Page(HTMLParser):
    """What a browser would see: tags with attributes, scripts, data by id, visible text."""

    def __init__(self, source: Path | str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self.text = ""
        self._inside = self._id = ""
        self.feed(source if isinstance(source, str) else source.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        self._id = dict(attributes).get("id") or ""
        if tag == "script" and not self._id:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and self._id:
            self.data[self._id] = json.loads(data)
        elif self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the small sweep: the page's path."""
    return report.write(fill_sweep(Folder(tmp_path_factory.mktemp("sweep"))).path)


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    """The page of the small sweep."""
    return Page(written)


def figures(page: Page) -> list[str]:
    return [attributes["data-figure"] or "" for _, attributes in page.tags if "data-figure" in attributes]


def test_files(written: Path, page: Page) -> None:
    assert written.name == "report.html"
    names = {str(path.relative_to(written.parent)) for path in written.parent.rglob("*") if path.is_file()}
    tables = {button["data-csv"] for button in page.named("button") if "data-csv" in button}
    assert {"main", "summary", "stopped", "trials"} <= tables
    files = {f"{name}.{kind}" for name in tables for kind in ("csv", "md", "tex")}
    files |= {f"figures/{name.removesuffix('-0')}.{kind}" for name in figures(page) for kind in ("svg", "pdf")}
    assert names == files | {"report.html", "files.json"}


def test_every_link_leads_somewhere(written: Path, page: Page) -> None:
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for link in page.named("a"):
        target = link["href"] or ""
        assert (target[1:] in anchors) if target.startswith("#") else (written.parent / target).is_file(), target


def test_the_tables_in_the_page_are_the_files(written: Path, page: Page) -> None:
    saved = {name.removeprefix("csv-"): text for name, text in page.data.items() if name.startswith("csv-")}
    assert len(saved) >= 4
    for name, text in saved.items():
        assert (written.parent / f"{name}.csv").read_text(encoding="utf-8") == text


def test_the_page_asks_for_nothing(page: Page) -> None:
    assert not page.named("iframe") + page.named("object") + page.named("form")
    assert {link["href"] for link in page.named("link")} == {"data:,"}
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.named("img"))
    assert all(set(script) <= {"type", "id"} for script in page.named("script"))


def test_the_policy_allows_the_pages_own_scripts_only(page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.scripts]
    assert rules["default-src"] == rules["connect-src"] == rules["font-src"] == rules["frame-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert len(page.scripts) == 3  # the theme, plotly.js, the page's own


def test_the_page_says_what_it_must(page: Page) -> None:
    for text in (
        "The best sparse configuration is rigl, S = 0.5, p = 0.5, ΔTe = 100",
        "no difference shown",
        "last report at full budget, never the smallest",
        "raysparse sweep tune_spaces/quickstart.yaml",
        "torch 2.15.0",
        "reference_hash",
        "ab12cd34",
        "3 of 10 were stopped early: 800 of 4,000 steps",
        "Both start from the same noise.",
    ):
        assert text in page.text


def test_every_figure_has_data_and_a_place(page: Page) -> None:
    names = figures(page)
    assert {f"{name}-0" for name in ("sparsity", "flops", "curves", "losses", "timeline")} <= set(names)
    assert {f"figure-{name}" for name in names} == {name for name in page.data if name.startswith("figure-")}
    assert all(page.data[f"figure-{name}"]["data"] for name in names)


def test_rows_and_points_can_be_filtered(page: Page) -> None:
    rows = [attributes.get("data-facet") for tag, attributes in page.tags if tag == "tr"]
    kinds = {tuple(page.data["facets"][int(place)]) for place in rows if place is not None}
    assert {("dense", 0.0, None), ("rigl", 0.5, 0.5), ("static", 0.9, None)} <= kinds
    points = page.data["figure-sparsity-0"]["data"]
    assert any("customdata" in trace for trace in points)


def test_sample_grids_of_the_same_seed_stand_side_by_side(page: Page) -> None:
    grids = [image["src"] for image in page.named("img")]
    assert grids == [f"data:image/png;base64,{base64.b64encode(picture(120)).decode()}"] * 2
    assert [image["alt"] for image in page.named("img")] == [
        "Grid of generated samples. Dense: dense, seed 1",
        "Grid of generated samples. Best sparse: rigl, S = 0.5, p = 0.5, ΔTe = 100, seed 1",
    ]


def test_grids_of_different_seeds_are_said_to_differ(folder: Folder) -> None:
    folder.add(facts("dense", 0.0, 1), [(400, 10.0)], samples=picture(1))
    folder.add(facts("rigl", 0.5, 2), [(400, 10.0)], samples=picture(2))
    assert "The seeds differ, so the noise does too." in Page(Report.of(folder.path).html()).text


def test_hostile_text_stays_text(folder: Folder) -> None:
    page = Page(Report.of(hostile(folder).path).html())
    assert len(page.scripts) == 3
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert all((image["src"] or "").startswith("data:image/png") for image in page.named("img"))
    for text in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><script>alert(2)</script>'):
        assert text in page.text


def test_several_protocols_make_several_sections(sweep: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    other = json.dumps(json.loads(PROTOCOL) | {"generated": 10})
    monkeypatch.setattr(vector, "missing", lambda: "not today")  # the figures' files take seconds
    report.write(sweep.path)
    sweep.add(facts("rigl", 0.5, 1, trial_id="other", protocol=other), [(400, 0.1)])
    page = Page(report.write(sweep.path))
    assert "These records differ in generated, so their FIDs are not comparable" in page.text
    assert len([each for each in page.named("section") if (each["id"] or "").startswith("section-")]) == 2
    names = {path.name for path in (sweep.path / "report").glob("main-*.csv")}
    assert len(names) == 2
    assert not (sweep.path / "report" / "main.csv").exists()  # of the report before: it would pass for this one's
    # No figure of the first section knows the other's value.
    assert "figure-sparsity-1" in page.data
    own = page.data["figure-sparsity-0"]["data"]
    assert "0.1" not in {str(value) for trace in own for value in trace.get("y", []) if isinstance(trace["y"], list)}


def test_without_matplotlib_all_but_the_files_of_figures_is_written(
    sweep: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != "matplotlib" and find(name, *rest))
    assert main([str(sweep.path)]) == 0
    assert "pip install 'matplotlib" in capsys.readouterr().err
    page = Page(sweep.path / "report" / "report.html")
    assert figures(page)
    assert "pip install 'matplotlib" in page.text
    assert not (sweep.path / "report" / "figures").exists()
    assert not [link for link in page.named("a") if (link["href"] or "").startswith("figures/")]


def test_printed_main_table_and_path(
    sweep: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_draw", lambda *_: None)  # figures take seconds
    (sweep.path / "records" / "bad.parquet").write_bytes(b"x")
    assert main([str(sweep.path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(sweep.path / "report" / "report.html")
    assert "| rigl | 0.5 | 0.5 | 100 | confirm | 3 | 11.50 ± 1.00 |" in printed.out
    assert "bad.parquet" in printed.err
    assert "bad.parquet" not in printed.out


def test_json_summary(sweep: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "missing", lambda: None)
    monkeypatch.setattr(report, "_draw", lambda *_: None)  # figures take seconds
    assert main([str(sweep.path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    (section,) = summary["sections"]
    assert section["best"]["method"] == "rigl"
    assert section["best"]["verdict"] == "no difference shown"
    assert Path(summary["report"]).is_file()


@pytest.mark.parametrize("case", ["absent", "no records", "no record", "output is a file"])
def test_user_errors_exit_with_2_and_write_nothing(
    folder: Folder, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder.path)]
    if case != "absent":
        folder.path.mkdir()
    if case == "no record":
        (folder.path / "records").mkdir()
    if case == "output is a file":
        folder.add(facts(), [(400, 1.0)])
        (tmp_path / "file").write_text("kept")
        arguments += ["--output", str(tmp_path / "file")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (folder.path / "report").exists()


def test_write_raises_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a results folder"):
        report.write(tmp_path)


def test_the_module_runs_without_torch_and_ray(sweep: Folder) -> None:
    code = (
        f"import sys; from analysis import vector; vector.missing = lambda: 'not today';"
        f"from analysis.__main__ import main; code = main([{str(sweep.path)!r}]);"
        "sys.exit(code or ', '.join({'torch', 'ray', 'optuna', 'pydantic'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


def test_help() -> None:
    command = [sys.executable, "-m", "analysis", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0
    assert "RESULTS" in done.stdout

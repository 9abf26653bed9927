from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_records import PROTOCOL, Folder, facts, fill_sweep, hostile, picture

from analysis import report
from analysis.__main__ import main
from raysparse.errors import UsageError


class Page(HTMLParser):
    """What a browser would see: tags with attributes, scripts, visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the small sweep."""
    return Page(report.write(fill_sweep(Folder(tmp_path_factory.mktemp("sweep"))).path))


def test_files(sweep: Folder, tmp_path: Path) -> None:
    assert report.write(sweep.path) == sweep.path / "report" / "report.html"
    names = {path.name for path in (sweep.path / "report").iterdir()}
    assert names == {"report.html", "files.json"} | {
        f"{n}.{k}" for n in ("main", "summary", "stopped", "trials") for k in ("csv", "md", "tex")
    }
    assert report.write(sweep.path, tmp_path / "there") == tmp_path / "there" / "report.html"


def test_the_page_asks_for_nothing(page: Page) -> None:
    assert not page.named("iframe") + page.named("object") + page.named("form")
    assert {link["href"] for link in page.named("link")} == {"data:,"}
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.named("img"))
    assert all(set(script) <= {"type", "id"} for script in page.named("script"))
    for anchor in page.named("a"):
        assert re.fullmatch(r"[a-z]+\.(csv|md|tex)|#section-\d+", anchor["href"] or ""), anchor


def test_the_policy_allows_the_pages_own_scripts_only(page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.scripts[1:]]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert len(page.scripts) == 3  # data, plotly.js, the page's own


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
    figures = json.loads(page.scripts[0])
    places = [attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes]
    assert places == [f"{name}-0" for name in ("sparsity", "flops", "curves", "losses", "timeline")]
    assert set(figures) == set(places)
    assert all(figure["data"] for figure in figures.values())


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
    assert "The seeds differ, so the noise does too." in Page(report.write(folder.path)).text


def test_hostile_text_stays_text(folder: Folder) -> None:
    page = Page(report.write(hostile(folder).path))
    assert len(page.scripts) == 3
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert all((image["src"] or "").startswith("data:image/png") for image in page.named("img"))
    for text in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><script>alert(2)</script>'):
        assert text in page.text


def test_several_protocols_make_several_sections(sweep: Folder) -> None:
    other = json.dumps(json.loads(PROTOCOL) | {"generated": 10})
    report.write(sweep.path)
    sweep.add(facts("rigl", 0.5, 1, trial_id="other", protocol=other), [(400, 0.1)])
    page = Page(report.write(sweep.path))
    assert "These records differ in generated, so their FIDs are not comparable" in page.text
    assert len(page.named("section")) == 2
    names = {path.name for path in (sweep.path / "report").glob("main-*.csv")}
    assert len(names) == 2
    assert not (sweep.path / "report" / "main.csv").exists()  # of the report before: it would pass for this one's
    # No figure of the first section knows the other's value.
    figures = json.loads(page.scripts[0])
    assert "sparsity-1" in figures
    assert "0.1" not in {str(value) for trace in figures["sparsity-0"]["data"] for value in trace.get("y", [])}


def test_printed_main_table_and_path(sweep: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep.path / "records" / "bad.parquet").write_bytes(b"x")
    assert main([str(sweep.path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(sweep.path / "report" / "report.html")
    assert "| rigl | 0.5 | 0.5 | 100 | confirm | 3 | 11.50 ± 1.00 |" in printed.out
    assert "bad.parquet" in printed.err
    assert "bad.parquet" not in printed.out


def test_json_summary(sweep: Folder, capsys: pytest.CaptureFixture[str]) -> None:
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
        f"import sys; from analysis.__main__ import main; code = main([{str(sweep.path)!r}]);"
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


def test_six_hundred_trials(folder: Folder) -> None:
    fill_sweep(folder)
    for number in range(600):
        method, sparsity = ("static", "magran", "rigl")[number % 3], (0.5, 0.75, 0.9)[number // 3 % 3]
        curve = [(step, 100 / step + number / 100) for step in range(40, 440, 40)]
        whole = number % 5 == 0
        trial = facts(method, sparsity, stage="search", trial_id=f"t{number}")
        folder.add(trial, curve if whole else curve[: number % 5 * 2], "COMPLETED" if whole else "STOPPED")
    started = time.process_time()
    page = report.write(folder.path)
    assert time.process_time() - started < 12  # 4 s on an idle core; a quadratic step would take minutes
    assert page.stat().st_size < 8_000_000

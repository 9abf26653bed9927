from __future__ import annotations

import re

import pytest
from synthetic_records import Folder, facts

from analysis import latex, tables
from analysis.load import read
from analysis.sections import Section, split


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("ΔTe ± −1\n2", r"$\Delta$Te $\pm$ $-$1 2"),
        ('a "b"', "a {''}b{''}"),
        ("$x^2$ #1 ~", r"\$x\textasciicircum{}2\$ \#1 \textasciitilde{}"),
        ("漢字\x00\x1b[0m", "漢字[0m"),
    ],
)
def test_no_character_is_a_command(text: str, escaped: str) -> None:
    assert latex.escape(text) == escaped


def test_marks_go_around_the_text() -> None:
    assert latex.cell("1 & 2", bold=True, underlined=True) == r"\textbf{\underline{1 \& 2}}"


def test_what_beats_dense_is_bold_and_the_best_underlined(grid: Section) -> None:
    # rigl at p = .05, S = .25 has 10 where dense has 12; no other best of a method is below dense.
    rows = [line for line in tables.summary(grid).latex().splitlines() if line.endswith(r"\\")]
    cells = {row.split(" & ")[0]: row.split(" & ")[5] for row in rows[1:]}
    assert cells == {
        "dense": r"12.00 $\pm$ 1.00",
        "magran": r"13.00 $\pm$ 1.00",
        "rigl": r"\textbf{\underline{10.00 $\pm$ 1.00}}",
        "static": r"14.00 $\pm$ 1.00",
    }
    assert "**<u>10.00 ± 1.00</u>**" in tables.summary(grid).markdown()


def test_the_table_is_whole(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5, trial_id=r"\write18{rm} & <x>"), [(100, 1.0)], "STOPPED", reason="50 % $ _ ^")
    (section,) = split(read(folder.path))
    text = tables.stopped(section).latex()
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows] == [len(columns.group(1))] * 2
    assert r"\write" not in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert [name for name in ("toprule", "midrule", "bottomrule") if text.count(f"\\{name}") != 1] == []


def test_an_empty_table_is_a_comment(grid: Section) -> None:
    assert tables.stopped(grid).latex() == "% No trial was stopped early.\n"

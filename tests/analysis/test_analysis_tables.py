from __future__ import annotations

import io
import math

import pandas as pd
import pytest
from synthetic_records import Folder, facts

from analysis import markup, table_html, tables, words
from analysis.load import read
from analysis.payload import Payload
from analysis.sections import Section, split


def only(folder: Folder) -> Section:
    (section,) = split(read(folder.path))
    return section


def cells(markdown: str) -> list[dict[str, str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_main_table_by_hand(sweep: Folder) -> None:
    rows = cells(tables.main(only(sweep)).markdown())
    assert len(rows) == 4 + 6  # confirmed, and search trials with a result: stopped and failed ones have none
    dense, best = rows[:2]
    assert (dense["method"], dense["stage"], dense["FID (stroke_stats)"]) == ("dense", "confirm", "11.00 ± 1.00")
    assert best == {
        "method": "rigl", "S": "0.5", "p": "0.5", "ΔTe": "100", "stage": "confirm", "seeds": "3",
        "FID (stroke_stats)": "11.50 ± 1.00", "KID (stroke_stats)": "0.0115 ± 0.0010", "params active": "32,510",
        "params ratio": "0.50", "inference FLOPs ratio": "0.50", "train FLOPs ratio": "0.50", "train time": "40 s",
        "time ratio": "1.00", "minus dense": "+0.50 (−2.73 to +3.73)", "verdict": "no difference shown",
    }  # fmt: skip
    assert {row["stage"] for row in rows[4:]} == {"search"}
    assert not any("±" in row["FID (stroke_stats)"] for row in rows[4:])


def test_sweeps_of_two_budgets_are_told_apart(sweep: Folder) -> None:
    sweep.add(facts("rigl", 0.5, 1, total_steps=800, trial_id="longer"), [(800, 9.0)])

    def steps(table: tables.Table) -> list[tuple[str, str, str]]:
        rows = cells(table.markdown())
        return [(row["method"], row["steps"], row["FID (stroke_stats)"]) for row in rows if row["S"] in ("0", "0.5")]

    confirmed = [("rigl", "800", "9.00"), ("rigl", "400", "11.50 ± 1.00"), ("static", "400", "16.00 ± 1.00")]
    assert steps(tables.main(only(sweep)))[:4] == [("dense", "400", "11.00 ± 1.00"), *confirmed]
    summary = [row[:2] for row in steps(tables.summary(only(sweep)))]
    assert summary == [("dense", "400"), ("rigl", "800"), ("static", "400")]


def test_no_mark_is_won_against_another_budget(two_budgets: Section) -> None:
    table = tables.summary(two_budgets)
    assert [(row["method"], row["steps"], row["FID (stroke_stats)"]) for row in cells(table.markdown())] == [
        ("dense", "400", "12.00 ± 1.00"),
        ("dense", "4,000", "62.00 ± 1.00"),
        ("rigl", "4,000", "**<u>7.00 ± 1.00</u>**"),
        ("static", "400", "<u>22.00 ± 1.00</u>"),  # below 62, but that is dense of 4,000 steps
    ]
    assert "per method of all budgets, and dense at each of these" in table.caption


def test_a_mark_needs_a_dense_of_its_budget(folder: Folder) -> None:
    for seed in (1, 2):
        folder.add(facts("dense", 0.0, seed), [(400, 30.0 + seed)])
        folder.add(facts("rigl", 0.5, seed, total_steps=800), [(800, 9.0 + seed)])
    dense, rigl = cells(tables.summary(only(folder)).markdown())
    assert (dense["steps"], dense["FID (stroke_stats)"]) == ("400", "31.50 ± 0.71")
    assert (rigl["steps"], rigl["FID (stroke_stats)"]) == ("800", "<u>10.50 ± 0.71</u>")


def test_the_csv_has_every_digit_and_the_protocol(sweep: Folder) -> None:
    section = only(sweep)
    frame = pd.read_csv(io.StringIO(tables.main(section).csv()))
    assert len(frame) == len(tables.main(section).frame)
    best = frame[frame["method"].eq("rigl") & frame["sparsity"].eq(0.5) & frame["stage"].eq("confirm")].iloc[0]
    assert best["fid_mean"] == 11.5
    assert best["params_ratio"] == 32510 / 65019
    assert best["protocol"] == section.protocol_text


def test_the_summary_has_dense_and_the_best_of_each_confirmed_method(sweep: Folder) -> None:
    rows = cells(tables.summary(only(sweep)).markdown())
    assert [(row["method"], row["S"]) for row in rows] == [("dense", "0"), ("rigl", "0.5"), ("static", "0.5")]


def test_what_was_stopped_when_and_what_it_saved(sweep: Folder) -> None:
    table = tables.stopped(only(sweep))
    assert table.frame["stopped_at_step"].tolist() == [100, 100, 200]
    assert table.frame["steps_saved"].tolist() == [300, 300, 200]
    # S = .75 costs .25 of 1e11 FLOPs; half of its steps were saved.
    assert table.frame["flops_saved_true"].iloc[2] == pytest.approx(0.25 * 1e11 / 2)
    assert "ASHA: rung 100" in table.markdown()


def test_what_a_person_stopped_is_not_the_schedulers(sweep: Folder) -> None:
    by_hand = facts("rigl", 0.5, 7, stage="search", trial_id="by-hand")
    sweep.add(by_hand, [(300, 30.0)], "STOPPED", reason="by me@here at step 300")
    table = tables.stopped(only(sweep))
    assert table.frame["stopped_at_step"].tolist() == [100, 100, 200, 300]
    assert table.frame["rung"].isna().tolist() == [False, False, False, True]
    assert "by me@here at step 300" in table.markdown()
    assert "or a person" in table.caption


def test_the_summary_says_which_stage_its_rows_are_of(folder: Folder) -> None:
    folder.add(facts("dense", 0.0, stage="search"), [(400, 10.0)])
    folder.add(facts("static", 0.5, stage="search"), [(400, 12.0)])
    assert "(search, one seed each)" in tables.summary(only(folder)).caption
    folder.add(facts("static", 0.5, 1), [(400, 11.0)])
    folder.add(facts("static", 0.5, 2), [(400, 12.0)])
    assert "(confirmed, over seeds; with one seed from the search)" in tables.summary(only(folder)).caption


def test_every_trial_is_in_the_trials_table(sweep: Folder) -> None:
    table = tables.trials(only(sweep))
    assert len(table.frame) == 22
    failed = next(row for row in cells(table.markdown()) if row["state"] == "failed")
    assert (failed["step"], failed["reason"]) == ("– / 400", "out of memory")


def test_a_folder_without_results_has_tables_that_say_so(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5, stage="search"), [], "RUNNING")
    section = only(folder)
    assert "No trial has reached its full budget yet." in tables.main(section).markdown()
    assert "No trial was stopped early." in table_html.html(tables.stopped(section), Payload())
    for table in (make(section) for make in (tables.summary, tables.main, tables.stopped, tables.trials)):
        assert table.csv().startswith(("configuration,", "trial_id,"))


def test_markdown_beyond_the_limit_says_how_many_rows_are_left_out(sweep: Folder) -> None:
    text = tables.main(only(sweep)).markdown(most=4)
    assert len(cells(text)) == 4
    assert "6 more rows in main.md" in text


def test_hostile_text_stays_in_its_cell(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5, trial_id="a|b <script>alert(1)<"), [(100, 1.0)], "STOPPED", reason="x\n| y | `z`")
    table = tables.stopped(only(folder))
    assert r"a\|b \<script\>alert(1)\<" in table.markdown()
    assert r"x \| y \| \`z\`" in table.markdown()
    assert "&lt;script&gt;" in table_html.html(table, Payload())
    assert "<script" not in table_html.html(table, Payload())


@pytest.mark.parametrize(
    ("mean", "std", "shown"),
    [
        (12.3456, 0.4, "12.35 ± 0.40"),
        (123.456, 3.21, "123.5 ± 3.2"),
        (0.012345, 0.0004, "0.0123 ± 0.0004"),
        (9000.5, 0.07, "9,000.50 ± 0.07"),
        (5.0, 0.0, "5.00 ± 0.00"),
        (5.0, math.nan, "5.00"),
        (math.nan, math.nan, "–"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (-1.5, 0.25, "-1.50 ± 0.25"),
    ],
)
def test_decimals_follow_size_and_spread(mean: float, std: float, shown: str) -> None:
    assert words.spread(mean, std) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.21, "3.2 s"), (59.6, "60 s"), (600, "10 min"), (36_000, "10.0 h"), (math.nan, "–")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert words.duration(seconds) == shown


def test_small_words() -> None:
    assert words.scientific(1.92036e13) == "1.92e13"
    assert words.percent(0.5) == "50\N{NO-BREAK SPACE}%"
    assert words.percent(0.0123) == "1.2\N{NO-BREAK SPACE}%"
    assert words.ratio(0.09999) == "0.10"
    assert words.ratio(0.0123) == "0.012"
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed([*"abcdefgh"], most=3) == "a, b and 6 more"


def test_drawn_numbers_are_cut_where_they_are_read_and_whole_in_the_csv(folder: Folder) -> None:
    for number, lr in enumerate((0.0031016900253760284, 3.1016900253760284e-05)):
        folder.add(facts("static", 0.5, stage="search", trial_id=f"t{number}", lr=lr), [(400, 9.0 + number)])
    table = tables.main(only(folder))
    shown = [row["other settings"] for row in cells(table.markdown())]
    assert shown == ["optimizer.lr=0.003102", "optimizer.lr=3.102e-05"]
    assert "0.0031016900253760284" in table.csv()
    assert words.others("block=[8, 16], drop=0.123456, teacher=/runs/1.23456/a, steps=12345") == (
        "block=[8, 16], drop=0.1235, teacher=/runs/1.23456/a, steps=12345"
    )


def test_tags_escape_text_and_attributes_but_not_markup() -> None:
    inner = markup.tag("b", "<i>")
    assert markup.tag("p", inner, "&", class_="x", data_y='"<', id=None) == (
        '<p class="x" data-y="&quot;&lt;"><b>&lt;i&gt;</b>&amp;</p>'
    )
    assert markup.tag("img", alt="a") == '<img alt="a">'

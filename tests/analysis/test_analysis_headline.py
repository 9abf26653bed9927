"""The first paragraph in every state of a sweep; what it says of numbers: test_analysis_sections.py."""

from __future__ import annotations

import json

import pytest
from synthetic_records import PROTOCOL, Folder, facts, fill_sweep

from analysis import headline, stats
from analysis.load import read
from analysis.sections import Section, split


def only(folder: Folder) -> Section:
    (section,) = split(read(folder.path))
    return section


def text(section: Section) -> str:
    return " ".join(headline.sentences(section)).replace("\N{NO-BREAK SPACE}", " ")


def confirmed(folder: Folder, dense: list[float], rigl: list[float]) -> Section:
    for method, sparsity, values in (("dense", 0.0, dense), ("rigl", 0.5, rigl)):
        for seed, fid in enumerate(values):
            folder.add(facts(method, sparsity, seed), [(400, fid)])
    return only(folder)


def test_shown_to_be_better_is_picked(folder: Folder) -> None:
    said = text(confirmed(folder, [20.0, 20.1, 20.2], [10.0, 10.1, 10.2]))
    assert "10.10 ± 0.10 over 3 seeds at full budget; we would pick it, before dense." in said
    assert "10.00 lower (better) than dense" in said


def test_shown_to_be_worse_is_not_picked(folder: Folder) -> None:
    said = text(confirmed(folder, [10.0, 10.1, 10.2], [20.0, 20.1, 20.2]))
    assert "by this value alone we would stay with dense." in said
    assert "10.00 higher (worse) than dense" in said
    assert "cheapest configuration" not in said


def test_no_difference_says_what_the_seeds_could_have_shown(folder: Folder) -> None:
    section = confirmed(folder, [10.0, 10.1, 10.2], [10.05, 10.15, 10.25])
    gap = stats.welch([10.05, 10.15, 10.25], [10.0, 10.1, 10.2])
    said = text(section)
    assert "we would pick it where what it saves is worth what the seeds leave open." in said
    half = (gap.high - gap.low) / 2
    assert (
        f"These seeds could show only a difference beyond {half:.2f}, {100 * half / 10.1:.0f} % of dense's value."
        in said
    )
    assert "confirm more seeds" not in said


def test_noisy_seeds_are_told_to_be_too_few(folder: Folder) -> None:
    said = text(confirmed(folder, [10.0, 11.0, 12.0], [8.0, 11.0, 15.0]))
    assert "of dense's value: confirm more seeds before relying on it." in said


def test_one_seed_a_side_is_not_picked(folder: Folder) -> None:
    said = text(confirmed(folder, [11.0], [5.0]))
    assert "we would run more seeds, of dense too, before picking it." in said
    assert "no difference is claimed" in said


def test_without_dense_the_pick_is_among_what_was_confirmed(folder: Folder) -> None:
    said = text(confirmed(folder, [], [5.0, 6.0]))
    assert "of what was confirmed we would pick it." in said
    assert "There is no dense result" in said


def test_dense_of_the_search_alone_proves_nothing(folder: Folder) -> None:
    folder.add(facts(stage="search"), [(400, 11.0)])
    section = confirmed(folder, [], [5.0, 6.0])
    said = text(section)
    assert "Dense was not confirmed: its 11.00 is one seed of the search, so the gap to it proves nothing." in said
    assert "another budget" not in said
    assert "we would run more seeds, of dense too" in said


def test_running_and_nothing_confirmed(folder: Folder) -> None:
    folder.add(facts(stage="search"), [(400, 11.0)])
    folder.add(facts("rigl", 0.5, stage="search"), [(400, 12.0)])
    folder.add(facts("rigl", 0.9, stage="search"), [(100, 50.0)], "RUNNING")
    said = text(only(folder))
    assert said.startswith("Nothing sparse is confirmed over several seeds yet, so this is no claim")
    assert "1 of 3 trials are still running" in said


def test_only_dense_is_done(folder: Folder) -> None:
    said = text(confirmed(folder, [10.0, 12.0], []))
    assert said == (
        "Dense reached FID (stroke_stats) 11.00 ± 1.41 over 2 seeds; no sparse trial has reached its full budget yet."
    )


def test_each_protocol_has_a_headline_of_its_own(folder: Folder) -> None:
    fill_sweep(folder)
    other = json.dumps(json.loads(PROTOCOL) | {"generated": 10})
    for seed in (1, 2):
        folder.add(facts("rigl", 0.9, seed, trial_id=f"o{seed}", protocol=other), [(400, 0.1)])
    first, second = split(read(folder.path))
    assert "0.10" not in text(first)
    assert "rigl, S = 0.9" in text(second)
    assert "There is no dense result" in text(second)


@pytest.mark.parametrize("state", ["FAILED", "STOPPED"])
def test_nothing_finished_at_all(folder: Folder, state: str) -> None:
    folder.add(facts("rigl", 0.5, stage="search"), [(100, 50.0)], state)
    assert text(only(folder)).startswith("No trial has reached its full budget yet")

"""What is printed on a terminal: no number is cut, however narrow it is."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.console import Console

from raysparse import config, pages, space, terminal
from raysparse.cli import plan

ROW = {
    "sparsity": 0.5, "params_active": 274_056_163, "params_total": 274_056_163, "flops_inference_paper": 1.9204e13,
    "flops_inference_true": 1.8697e13, "flops_train_paper": 9.0046e16, "flops_train_true": 1.0805e18,
    "layers_dense": {}, "layers_by_element": [],
}  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_a_table_keeps_every_number_at_every_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_wide_console", lambda: Console(width=width))
    terminal.print_cost(config.TrialConfig(), [ROW])
    said = capsys.readouterr().out
    assert "chirodiff: 274,056,163 parameters" in said
    for number in ("0.50", "274,056,163", "1.9204e+13", "1.8697e+13", "9.0046e+16", "1.0805e+18"):
        assert number in said.split("parameters", 1)[1]
    assert "…" not in said
    if width >= 80:  # with less the terminal wraps the rows
        assert max(cell_len(line) for line in said.splitlines()) <= width


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_the_course_of_a_trial_keeps_every_number_at_every_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "_console", lambda: Console(width=width))
    report = {"step": 40_800, "fid": 123.456, "kid": 0.12345, "train_loss": 0.9876, "density": 0.5, "train_s": 4_000}
    page = dict.fromkeys(("reason", "protocol", "log", "samples", "checkpoint", "command", "what_to_do"))
    page |= {"trial_id": "rigl-0123456789", "state": "COMPLETED", "stage": "search", "point": {}, "seed": 0}
    page |= {"intermediate_protocol": None, "events": [], "reports": [report]}
    page |= {"rungs": [{"rung": 2_040, "fid": 123.456, "place": 1, "of": 3}]}
    pages.print_trial(page)
    said = capsys.readouterr().out
    assert "…" not in said
    for text in ("40,800", "123.456", "0.12345", "0.9876", "0.5000", "67 min", "2040: 1 of 3"):
        assert text in said


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_a_plan_keeps_every_number_at_every_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "Console", lambda **_: Console(width=width))
    row = {"method": "rigl", "sparsity": 0.5, "params_active": 274_056_163}
    row |= {f"flops_{of}_true": 1.5 for of in ("inference", "train")}
    row |= {f"flops_{of}_dense_true": 2.0 for of in ("inference", "train")}
    full = dict.fromkeys(("completed", "confirm_trials", "confirm_steps", "unit_hours", "hours", "money"), 0)
    full |= {"search_steps": 12_345_678, "flops_train_true": 1.0805e18, "checkpoints_bytes": 123e9}
    expected = {name: {"mean": value, "low": 1234, "high": 1235} for name, value in full.items()}
    planned = {"name": "all", "search_trials": 2, "steps_per_trial": 5, "trials": [row, row | {"sparsity": 0.75}]}
    planned |= {"step_s": 0.1, "evaluation_s": 0.2, "last_evaluation_s": 0.2, "caution": None}
    found = {"plan": planned, "full": full, "expected": expected, "saved_share": None, "workers": 2, "unit": "CPU"}
    found |= {"price_per_hour": 1.5, "timed": "measured", "curves": "recorded"}
    sweep = space.parse({"name": "all", "grid": {"dense": {}}}, "all")
    plan.show(sweep, found)
    said = capsys.readouterr().out
    assert "…" not in said
    for number in ("0.5 to 0.75", "274,056,163", "0.750", "12,345,678 (1,234 to 1,235)", "1.08e+18 (1.23e+03"):
        assert number in said.replace("\n", "")


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_a_difference_keeps_the_names_of_settings_at_every_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "_console", lambda: Console(width=width))
    trials = [{"trial_id": f"rigl-012345678{last}", "state": "COMPLETED"} for last in "ab"]
    settings = {"sparse.prune_schedule": ["constant", "cosine"], "sparse.prune_ratio": [0.2048943481551881, None]}
    pages.print_difference({"trials": trials, "settings": settings, "comparable": True, "fids": []})
    said = capsys.readouterr().out
    assert "…" not in said
    names = "".join(line.split("  ")[0] for line in said.splitlines())
    assert "sparse.prune_schedule" in names
    assert "sparse.prune_ratio" in names

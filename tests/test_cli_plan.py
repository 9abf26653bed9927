"""`raysparse plan`: the figures add up, come from where it says, and fit a terminal of 100 columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_trials import record

from raysparse import cli, space
from raysparse.errors import UsageError
from raysparse.sweep import objectives, preparing, price
from raysparse.sweep.curves import Published
from raysparse.sweep.simulate import simulate
from raysparse.train import plan as plans

SPACES = Path(__file__).resolve().parents[1] / "tune_spaces"
SMALL = [
    str(SPACES / "quickstart.yaml"),
    "--worlds=3",
    "--workers=2",
    "--set=base.evaluate.extractor=oriented_energy",
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raysparse", "plan", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def as_json(run: Callable[..., tuple[int, str, str]], *words: str) -> dict[str, Any]:
    code, out, _ = run(*words, "--json")
    assert code == 0
    return dict(json.loads(out))


def test_the_figures_add_up(run: Callable[..., tuple[int, str, str]]) -> None:
    found = as_json(run, *SMALL, "--step-seconds", "0.5", "--price-per-hour", "3")
    full, expected = found["full"], found["expected"]
    sweep = space.load(SPACES / "quickstart.yaml")
    trial = space.parsed_base(sweep).train
    assert full["search_steps"] == space.trial_count(sweep) * trial.steps
    assert full["confirm_steps"] == full["confirm_trials"] * trial.steps == 12 * trial.steps
    seconds = (full["search_steps"] + full["confirm_steps"]) * 0.5
    reports = (10 + 12) * -(-trial.steps // space.parsed_base(sweep).evaluate.every_steps)
    seconds += reports * found["plan"]["evaluation_s"]
    assert full["unit_hours"] == pytest.approx(seconds / 3600)
    assert full["money"] == pytest.approx(3 * seconds / 3600)
    assert full["checkpoints_bytes"] == 22 * 2 * found["checkpoint_bytes"]
    for name in ("search_steps", "unit_hours", "money", "flops_train_true", "hours"):
        assert expected[name]["low"] <= expected[name]["mean"] <= expected[name]["high"] <= full[name] * 1.2
    assert expected["search_steps"]["mean"] == pytest.approx(full["search_steps"] * (1 - found["saved_share"]["mean"]))
    assert 0 < found["saved_share"]["mean"] < 1
    assert found["timed"].startswith("the step is given")
    assert "standing in for hershey" in found["curves"]
    assert (found["unit"], found["workers"], found["worlds"]) == ("CPU", 2, 3)


RIGL = {"rigl": {"sparsity": [0.5]}}


@pytest.mark.parametrize(
    ("walk", "best", "expected"),
    [
        ({"grid": RIGL}, 1, 6),
        ({"grid": RIGL | {"dense": {}}}, 2, 6),
        ({"grid": {"dense": {"optimizer.lr": [1e-3, 2e-3]}}}, 2, 6),
        ({"search": {"trials": 2, "axes": RIGL}}, 1, 6),
        ({"search": {"trials": 9, "axes": {"static": {}, "rigl": {"sparsity": [0.5, 0.9]}}}}, 2, 12),
    ],
)
def test_the_confirm_stage_is_counted_as_it_runs(walk: dict[str, Any], best: int, expected: int) -> None:
    confirm = {"confirm": {"seeds": [1, 2, 3], "best_per_method": best}}
    sweep = space.parse({"name": "s", "base": {"evaluate": {"every_steps": 40_800}}} | walk | confirm, "s")
    assert plans.plan(sweep, seconds=plans.Seconds(1, 1, 1))["confirm_trials"] == expected
    run = simulate(sweep, Published.nearest(space.parsed_base(sweep).model_dump(mode="json")), workers=1)
    assert len(run.board.of_stage("confirm")) == expected


@pytest.mark.parametrize(("gpus", "words"), [(0.125, "what 8 that share it lose to each other"), (1, None), (0, None)])
def test_seconds_of_a_trial_alone_are_not_passed_off_as_those_of_trials_that_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]], gpus: float, words: str | None
) -> None:
    monkeypatch.setattr(plans, "measure", lambda *_: (0.5, 3.0, 3.0))
    monkeypatch.setattr(plans.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plans.torch.cuda, "device_count", lambda: 1)
    asked = [*SMALL[:1], *SMALL[3:], "--worlds=1", "--cpus=16", f"--set=resources.gpus_per_worker={gpus}"]
    found = as_json(run, *asked)
    assert found["workers"] == {0.125: 8, 1: 1, 0: 16}[gpus]
    said = " ".join(run(*asked)[1].split())
    assert words in said if words else "alone on the GPU" not in said
    assert as_json(run, *asked, "--step-seconds=.5")["plan"]["caution"] is None


def test_a_plan_for_gpus_made_without_one_says_so(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr(plans, "measure", lambda *_: (0.5, 3.0, 3.0))
    monkeypatch.setattr(plans.torch.cuda, "is_available", lambda: False)
    _, out, _ = run(*SMALL, "--worlds=1", "--set=resources.gpus_per_worker=0.125")
    assert "asks for GPUs and this machine has none" in " ".join(out.split())


def test_without_a_price_there_is_no_money_and_without_asha_nothing_is_saved(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    found = as_json(run, *SMALL, "--step-seconds", "0.5", "--set", "asha=null")
    assert (found["full"]["money"], found["expected"]["money"]) == (None, None)
    assert found["saved_share"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["expected"]["search_steps"]["mean"] == found["full"]["search_steps"]


@pytest.mark.parametrize(("room", "all_at_once"), [(64, 1.0), (20, 4.0)])
def test_a_gpu_is_timed_with_all_examples_that_it_has_room_for_once_its_kernels_are_compiled(
    room: int, all_at_once: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = 0.0, 0

    def work(examples: int) -> None:
        nonlocal now, calls
        if examples > room:
            raise torch.OutOfMemoryError
        calls += 1
        now += 30 if calls == 1 else 1  # whatever their number

    monkeypatch.setattr(plans.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert plans._seconds(work, lambda count: count, 64, "cuda") == all_at_once


def test_a_gpu_is_timed_with_as_many_samples_as_it_is_given_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = space.parsed_base(space.load(SPACES / "kanjivg.yaml"))
    asked: list[int] = []

    def noted(work: object, inputs: object, batch: int, device: str) -> float:
        asked.append(batch)
        return 1.0

    monkeypatch.setattr(plans, "_seconds", noted)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: model)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        plans.measure(trial, 88.6)
    batch, size = trial.train.batch_size, trial.evaluate.batch_size
    assert asked == [batch, size, batch, 3927 // size * size]


def test_a_worker_is_timed_with_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"generated": 1000, "batch_size": 256}
    sweep = space.load(SPACES / "quickstart.yaml", {f"base.evaluate.{name}": value for name, value in settings.items()})
    trial = space.parsed_base(sweep)
    asked: list[int] = []

    def noted(work: object, inputs: object, batch: int, device: str) -> float:
        asked.append(batch)
        return float(batch)

    monkeypatch.setattr(plans, "_seconds", noted)
    one, four, eight = (plans.measure(trial, 44.2, workers) for workers in (1, 4, 8))
    assert asked == [128, 256, 32, 256, 16, 256]
    assert (one.step, four.step, eight.step) == (128, 32, 16)
    # 20 forward passes for each sample: of all, and of one of the four batches.
    assert (one.evaluation, four.evaluation, eight.evaluation) == (20 * 1000, 20 * 256, 20 * 256)


def test_it_is_measured_in_the_trials_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"base.train.precision": "bf16", "base.evaluate.precision": "fp32"}
    trial = space.parsed_base(space.load(SPACES / "quickstart.yaml", changes))
    used: list[str] = []
    autocast = plans.runtime.autocast
    monkeypatch.setattr(plans.runtime, "autocast", lambda name, device: used.append(name) or autocast(name, device))
    assert plans.measure(trial, 4.0).step > 0
    assert set(used) == {"bf16", "fp32"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resources.workers": 8}, "one of 8 workers"),
        ({"base.train.compile": True, "base.train.cuda_graph": True}, "without train.compile, train.cuda_graph"),
        ({}, None),
    ],
)
def test_what_the_seconds_leave_out_is_said(changes: dict[str, Any], words: str | None) -> None:
    said = plans._caution(space.load(SPACES / "quickstart.yaml", changes))
    assert said is None if words is None else words in str(said)


def test_seconds_and_curves_from_records(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    sweep = space.load(SPACES / "quickstart.yaml")
    for number, point in enumerate(({"method": "dense"}, {"method": "rigl", "sparsity": 0.5})):
        steps = {90: 90.0 + number, 180: 70.0 + number, 270: 60.0, 360: 50.0 + number}
        record(tmp_path, space.trial(sweep, point), steps, "COMPLETED")
    assert price.recorded_seconds([tmp_path]) == (0.5, 3.0, 3.0)
    found = as_json(run, *SMALL, "--results", str(tmp_path))
    assert (found["plan"]["step_s"], found["plan"]["evaluation_s"], found["timed"]) == (0.5, 3.0, "recorded")
    assert found["curves"] == f"recorded: 2 trials of {tmp_path}"
    assert found["expected"]["best_fid"]["low"] in (50.0, 51.0)


def test_drawn_trials_cost_what_their_settings_do(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no seed points: dense alone is planned."""
    axes = {"rigl": {"sparsity": [0.9], "prune_ratio": {"low": 0.05, "high": 0.5}}}
    search = json.dumps({"trials": 5, "sampler": "random", "axes": axes})
    asked = [*SMALL, "--step-seconds=.5", f"--set=search={search}", "--set=confirm=null", "--set=asha=null"]
    found = as_json(run, *asked)
    sweep = space.load(SPACES / "quickstart.yaml")
    dense, rigl = (
        objectives.costs(space.trial(sweep, point))["flops_train"]
        for point in ({"method": "dense"}, {"method": "rigl", "sparsity": 0.9})
    )
    assert rigl < 0.5 * dense
    assert found["full"]["flops_train_true"] == pytest.approx(dense + 4 * rigl)

    ranges = axes | {"rigl": {"sparsity": {"low": 0.5, "high": 0.95}}}
    asked[-3] = f"--set=search={json.dumps({'trials': 40, 'sampler': 'random', 'axes': ranges})}"
    exact = as_json(run, *asked)["full"]["flops_train_true"]
    monkeypatch.setattr(price, "COSTED", 12)
    assert as_json(run, *asked)["full"]["flops_train_true"] == pytest.approx(exact, rel=0.05)


def test_the_tables_fit_a_hundred_columns(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(*SMALL, "--step-seconds", "0.5", "--price-per-hour", "1234.5")
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 100
    for words in ("10 trials of 360 steps", "early stopping saves", "CPU hours", "checkpoints on disk", "money"):
        assert words in out
    assert "…" not in out


def test_mistakes_are_said(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert run(*SMALL, "--results", str(tmp_path), "--curves", "kanjivg")[0] == 2
    code, _, err = run(*SMALL, "--results", str(tmp_path))
    assert (code, "is not a results folder" in err) == (2, True)
    code, _, err = run(*SMALL, "--step-seconds", "1", "--curves", "kanji")
    assert (code, "did you mean" in err or "kanjivg" in err) == (2, True)


@pytest.mark.parametrize("entry", [plans.plan, preparing.prepare])
@pytest.mark.parametrize(
    ("axes", "section", "setting"),
    [
        ({"nm_ste": {}, "static": {"sparsity": [0.5]}}, "train", "train.runtime 'sparse' cannot run here"),
        ({"static": {"sparsity": [0.5]}, "timesteps": {}}, "evaluate", "evaluate.runtime 'sparse' cannot run here"),
    ],
)
def test_kernels_that_one_of_the_methods_never_has_are_refused_first(
    entry: Callable[..., Any], axes: dict[str, Any], section: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans.setup, "check", lambda _: pytest.fail("later"))
    base = {"data": {"name": "hershey"}, "train": {"steps": 20}, "evaluate": {"every_steps": 10}}
    base[section] = {**base[section], "runtime": "sparse"}
    sweep = space.Sweep(name="x", base=base, grid=axes)
    with pytest.raises(UsageError, match=setting):
        entry(sweep)


@pytest.mark.parametrize("entry", [plans.plan, preparing.prepare])
@pytest.mark.parametrize("walk", ["grid", "seed points"])
def test_the_settings_of_every_planned_trial_are_checked_first(
    entry: Callable[..., Any], walk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two trials that differ in settings of sparsity alone is nearly dense to its end."""
    monkeypatch.setattr(plans.setup, "check", lambda _: pytest.fail("later"))
    base = {"data": {"name": "hershey"}, "train": {"steps": 20}, "evaluate": {"every_steps": 10}}
    axes = {"nm_ste": {"stages": ["progressive"], "stage_steps": [6, 4]}, "static": {}}
    points = [{"method": "nm_ste", "stages": "progressive", "stage_steps": length} for length in (6, 4)]
    search = {"trials": 3, "axes": axes, "seed_points": points}
    sweep = space.Sweep(name="x", base=base, **({"grid": axes} if walk == "grid" else {"search": search}))
    with pytest.raises(UsageError, match=r"x, \{.*'stage_steps': 6\}: stages 'progressive' .* at step 24"):
        entry(sweep)


@pytest.mark.parametrize("entry", [plans.plan, preparing.prepare])
@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"static": {"sparsity": [0.9999, 0.5]}}, r"'sparsity': 0.9999\}: .*each layer keeps at least one"),
        ({"rigl": {"pattern": ["block"], "block": [64, 16]}}, r"'block': 64\}: pattern 'block' fits no layer"),
        ({"timesteps": {"ranges": ["0-500:0.5", "0-1000:0.5"]}}, r"'ranges': '0-500:0.5'\}: .*end at 500"),
    ],
)
def test_a_point_of_a_grid_that_does_not_fit_the_model_is_refused_first(
    entry: Callable[..., Any], axes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans.setup, "check", lambda _: pytest.fail("later"))
    monkeypatch.setattr(plans.setup, "estimate", lambda _: pytest.fail("later"))
    base = {"data": {"name": "hershey"}, "train": {"steps": 20}, "evaluate": {"every_steps": 10}}
    base |= {"model": {"options": {"hidden": 16, "layers": 1}}}
    with pytest.raises(UsageError, match=f"x, .*{said}"):
        entry(space.Sweep(name="x", base=base, grid=axes))

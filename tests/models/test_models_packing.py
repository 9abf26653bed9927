"""benchmarks/packing.py runs, and trials trained together become what they become alone. Speed is not tested."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_script import run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/packing.py"
TINY = ["--sizes", "8x2", "--batch", "6", "--longest", "12", "--turns", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    path, threads = list(sys.path), torch.get_num_threads()
    yield runpy.run_path(str(SCRIPT))
    sys.path[:] = path
    torch.set_num_threads(threads)


def work_of(script: dict[str, Any], **changes: Any) -> Any:
    return script["Work"](hidden=8, layers=2, batch=6, longest=12, interval=2, **changes)


def state(trial: Any) -> dict[str, torch.Tensor]:
    """Weights, moments, running mean and masks."""
    found = {f"weight {name}": weight.detach() for name, weight in trial.model.named_parameters()}
    found |= {f"mean {name}": value for name, value in trial.shadow.items()}
    for name, weight in trial.model.named_parameters():
        found |= {f"{key} {name}": trial.optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
    return found


def test_trials_together_become_what_they_become_alone(script: dict[str, Any]) -> None:
    """Five steps with two topology updates; other methods, sparsities, seeds, learning rates and lengths each."""
    work = work_of(script)
    alone, together = ([script["Trial"](work, number) for number in range(5)] for _ in range(2))
    stack = script["Stack"](together)
    first = [dict(trial.engine.masks) for trial in alone]
    for step in range(5):
        batches = [script["batch_of"](work, number, step) for number in range(5)]
        assert len({tuple(sorted(batch.lengths.tolist())) for batch in batches}) > 1
        for trial, batch in zip(alone, batches, strict=True):
            trial.step(batch)
        stack.step(batches)
    assert [trial.engine.updates for trial in alone] == [2, 0, 2, 0, 2]
    for one, other, before in zip(alone, together, first, strict=True):
        assert one.engine.masks.keys() == other.engine.masks.keys()
        for name, mask in one.engine.masks.items():
            assert torch.equal(mask, other.engine.masks[name])
            assert not other.model.get_parameter(name)[~mask].any()
        changed = any(not torch.equal(mask, before[name]) for name, mask in other.engine.masks.items())
        assert changed == (other.engine.updates > 0)
        for name, value in state(one).items():
            torch.testing.assert_close(state(other)[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(stack.weights["mix.weight"][0], stack.weights["mix.weight"][4]), "each has its own"


def test_one_trials_gradient_knows_nothing_of_the_others(script: dict[str, Any]) -> None:
    work = work_of(script)
    batches = [script["batch_of"](work, number, 0) for number in range(3)]
    spoilt = [dataclasses.replace(batches[0], x=torch.full_like(batches[0].x, torch.nan)), *batches[1:]]
    gradients = []
    for given in (batches, spoilt):
        stack = script["Stack"]([script["Trial"](work, number) for number in range(3)])
        stack.step(given)
        gradients.append({name: weight.grad for name, weight in stack.weights.items()})
    for name, right in gradients[0].items():
        assert torch.equal(right[1:], gradients[1][name][1:]), name
        assert right[1:].any()


def test_a_trial_alone_waits_for_no_more_than_the_project_does(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: its batch comes from pinned memory, and lengths stay on the host, where cuDNN's packing needs them."""
    found: list[torch.Tensor] = []

    def noted(tensor: torch.Tensor, _: torch.device) -> torch.Tensor:
        found.append(tensor)
        return tensor

    monkeypatch.setitem(script["Trial"].step.__globals__, "on_device", noted)
    batch = script["batch_of"](work_of(script), 0, 0)
    script["Trial"](work_of(script), 0).step(batch)
    assert [id(tensor) for tensor in found] == [id(batch.x), id(batch.eps), id(batch.timesteps)]


@pytest.mark.slow
def test_a_small_run_without_ray_prints_every_row_and_says_what_is_unmeasured(tmp_path: Path) -> None:
    done = run("packing.py", tmp_path, *TINY, "--trials", "2")
    assert (done.returncode, done.stderr) == (0, "")
    check(done.stdout, {"alone", "alone, stacked", "processes", "one by one", "stacked"})


def test_a_small_run_by_cpu_time_starts_no_processes(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    script["main"]([*TINY, "--trials", "2", "--cpu-time"])
    check(capsys.readouterr().out, {"alone", "alone, stacked", "one by one", "stacked"})


def check(printed: str, measured: set[str]) -> None:
    head, *rows = [line.split(" | ") for line in printed.splitlines() if " | " in line]
    assert head[3:7] == ["runtime", "trials", "ms per step of all", "trial-steps per s"]
    found = {row[3]: row for row in rows}
    graphs = {"alone, CUDA graph", "one by one, CUDA graph", "stacked, CUDA graph"} | {
        f"alone, {how}" for how in ("cuDNN", "recorded")
    }
    assert found.keys() == measured | graphs
    for name, row in found.items():
        assert row[0] == "2,539"
        assert (row[5] == "unmeasured (no GPU)") == (name in graphs)
        if name in measured:
            trials, milliseconds, rate = float(row[4]), float(row[5]), float(row[6])
            assert rate == pytest.approx(1e3 * trials / milliseconds, rel=0.05)
            assert row[8] == ("0.375" if trials == 2 else "0.500")
            assert row[9].endswith(" MiB") or row[9] == "unmeasured"
    assert found["alone"][7] == "1.00 / 1.00 / 1.00"


@pytest.mark.gpu
def test_a_cuda_graph_does_what_the_same_steps_do_without_one(script: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    work = work_of(script, device="cuda")
    batches = [[script["batch_of"](work, number, step) for number in range(3)] for step in range(4)]
    eager, graphed = (script["Stack"]([script["Trial"](work, number) for number in range(3)]) for _ in range(2))
    graph = script["Graph"](graphed, batches[0])  # has made three steps on these when it is ready
    for step in range(4):
        if step:
            graph.step(batches[step])
        for _ in range(1 if step else 3):
            eager.run(script["padded"](batches[step], "cuda"))
    for one, other in zip(eager.trials, graphed.trials, strict=True):
        for name, value in state(one).items():
            torch.testing.assert_close(state(other)[name], value, rtol=1e-4, atol=1e-6, msg=name)

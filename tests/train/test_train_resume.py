"""N steps equal k steps, a resume and N - k steps, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from trainer_state import assert_same, computed, everything, stopped_and_resumed, tensors_of
from two_ranks import on_two_ranks

from raysparse import results
from raysparse.config import TrialConfig
from raysparse.errors import RanksApart
from raysparse.results import Report
from raysparse.train import run, setup, state


@pytest.fixture(scope="module", params=["rigl", "magran", "dense"])
def undisturbed(tiny, rigl, tmp_path_factory, request):
    """A trial, what it reports in one go, and its state at the end."""
    trial = tiny(rigl, {"sparse.method": request.param}) if request.param != "dense" else tiny()
    straight = setup.build(trial)
    expected = [computed(report) for report in straight.run()]
    assert straight.step == 12
    assert straight.engine.updates == (0 if request.param == "dense" else 3)
    return trial, expected, everything(straight, tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("stop_after", [4, 5, 9])  # at a report; between two, before and after topology updates
def test_resume_is_bit_exact(undisturbed, tmp_path, stop_after):
    trial, expected, straight = undisturbed
    second, seen = stopped_and_resumed(trial, stop_after, tmp_path / "checkpoint")
    assert seen == expected
    assert_same(straight, everything(second, tmp_path / "second"))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("stop_after", [4, 5])
def test_resume_of_sparse_kernels_is_bit_exact(tiny, rigl, tmp_path, stop_after):
    trial = tiny(rigl, {"train.runtime": "sparse", "evaluate.runtime": "sparse", "sparse.sparsity": 0.8})
    straight = setup.build(trial)
    expected = [computed(report) for report in straight.run()]
    assert straight.engine.updates == 3

    second, seen = stopped_and_resumed(trial, stop_after, tmp_path / "checkpoint")
    assert seen == expected
    assert_same(everything(straight, tmp_path / "a"), everything(second, tmp_path / "b"))


def test_evaluation_leaves_training_alone(tiny, rigl, tmp_path):
    often, never = (setup.build(tiny(rigl, {"evaluate.every_steps": every})) for every in (1, 12))
    assert len(list(often.run())) == 12
    assert len(list(never.run())) == 1
    a, b = everything(often, tmp_path / "a"), everything(never, tmp_path / "b")
    reported = {name for name in a if "reported" in name}
    assert reported
    assert_same({k: v for k, v in a.items() if k not in reported}, {k: v for k, v in b.items() if k not in reported})


def test_an_evaluation_that_was_interrupted_is_begun_again(tiny, rigl, tmp_path):
    """generated 24 at 8 a batch: asked once before each of three batches of samples, beside the training steps."""
    trial = tiny(rigl, {"evaluate.batch_size": 8})
    expected = [computed(report) for report in setup.build(trial).run()]
    first, asked = setup.build(trial), []

    def in_the_second_batch() -> bool:
        asked.append(first.step)
        return asked[-3:] == [4, 4, 4]  # after step 4, before the first batch, before the second

    first.should_stop = in_the_second_batch
    assert list(first.run()) == []
    assert (first.step, first.totals.reported) == (4, 0)
    second = setup.build(trial)
    state.load(second, state.save(first, tmp_path / "checkpoint"))
    assert [computed(report) for report in second.run()] == expected


def test_a_finished_trial_has_nothing_left_to_do(tiny, tmp_path):
    trainer = setup.build(tiny({"train.steps": 2}))
    assert [report.step for report in trainer.run()] == [2]
    assert list(trainer.run()) == []


def test_interrupted_run_goes_on_bit_for_bit(tiny, rigl, tmp_path):
    trial = tiny(rigl)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run.train(trial, whole, device="cpu").state == "COMPLETED"

    heard: list[int] = []

    def interrupt(report: Report) -> None:
        heard.append(report.step)
        os.kill(os.getpid(), signal.SIGINT)

    first = run.train(trial, parts, device="cpu", on_report=interrupt)
    assert first.state == "RUNNING"
    assert first.state_reason == "interrupted at step 5; the same command goes on from there"
    assert heard == [4]

    second = run.train(trial, parts, device="cpu", on_report=lambda report: heard.append(report.step))
    assert second.state == "COMPLETED"
    assert heard == [4, 8, 12]
    last = [state.latest(out / "checkpoints" / trial.trial_id) for out in (whole, parts)]
    assert_same(tensors_of(last[0]), tensors_of(last[1]))
    tables = [results.read_trial(out / "records" / f"{trial.trial_id}.parquet") for out in (whole, parts)]
    a, b = ([computed(report) for report in results.reports_of(table)] for table in tables)
    assert a == b


@pytest.mark.parametrize(("runtime", "accumulate"), [("dense", 1), ("sparse", 2)])
def test_two_ranks_resume_bit_exact(tiny, rigl, tmp_path, runtime, accumulate, request):
    """sparse: by kernels, but for the steps that grow, where DDP averages the dense gradients."""
    if runtime == "sparse":
        request.getfixturevalue("compiler")
    changes = {"train.steps": 24, "evaluate.every_steps": 12, "sparse.update_interval": 5, "train.runtime": runtime}
    trial = tiny(rigl, changes, {"train.accumulate": accumulate})
    on_two_ranks(_resumed, trial, tmp_path)


def _resumed(rank: int, trial: TrialConfig, folder: Path) -> None:
    """Train to the end; train, stop between two reports, resume in a new trainer. Any difference fails the process."""
    straight, first, second = (setup.build(trial, rank=rank, world_size=2) for _ in range(3))
    expected = [computed(report) for report in straight.run()]
    assert straight.engine.updates == 4
    assert (straight._sparse_step is not None) == (trial.train.runtime == "sparse")
    alone = setup.build(trial)  # the whole batch: the same but for rounding
    alone._train_to(24)
    for ours, theirs in zip(straight.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    first.should_stop = lambda: rank == 1  # one rank's wish stops both, at the next look
    assert list(first.run()) == []
    assert first.step == 10
    state.save(first, folder / "checkpoint")
    torch.distributed.barrier()
    if rank == 0:
        state.load(second, folder / "checkpoint")
    with pytest.raises(RanksApart, match="checkpoint of step 10, rank 1 that of step 0: see "):
        second.resume([])
    state.load(second, folder / "checkpoint")
    second.totals.evaluate_s += rank  # as in another save of this step
    with pytest.raises(RanksApart, match="rank 1 another one of this step: see "):
        second.resume([])
    state.load(second, folder / "checkpoint")
    second.resume([])
    assert [computed(report) for report in second.run()] == expected
    for a, b in ((straight.model, second.model), (straight.ema.model, second.ema.model)):
        assert_same(a.state_dict(), b.state_dict())
    assert_same(straight.engine.masks, second.engine.masks)
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (straight, second)]
    for mine, theirs in zip(*(states.values() for states in moments), strict=True):
        assert_same(mine, theirs)

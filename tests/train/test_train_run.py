"""A trial in this process and on two workers; bad settings; a worker that dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import operator
import os
import queue
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest
import safetensors.torch
import torch
from trainer_state import assert_same, tensors_of

from raysparse import results
from raysparse.errors import UsageError, WorkerDied
from raysparse.train import claims, ranks, run, setup, state
from raysparse.train.loop import Trainer

SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.clip_norm": None}


def test_two_workers_equal_one(tiny, tmp_path):
    trial = tiny(SGD, {"train.steps": 3, "train.accumulate": 2})
    found = []
    for workers in (1, 2):
        reports = []
        out = tmp_path / str(workers)
        outcome = run.train(trial, out, workers=workers, device="cpu", on_report=reports.append)
        assert outcome.state == "COMPLETED"
        last = state.latest(out / "checkpoints" / trial.trial_id)
        weights = safetensors.torch.load_file(last / "weights.safetensors")
        table = results.read_trial(out / "records" / f"{trial.trial_id}.parquet")
        assert table["world_size"].to_pylist() == [workers]
        assert results.reports_of(table) == reports
        found.append((weights, reports[0]))
    (one, report_1), (two, report_2) = found
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    assert report_1.train_loss == pytest.approx(report_2.train_loss, rel=1e-5)
    assert report_1.validation_loss == pytest.approx(report_2.validation_loss, rel=1e-5)
    assert report_1.fid == pytest.approx(report_2.fid, rel=1e-3)  # drawn pixels jump where a coordinate rounds


def test_an_interrupt_in_the_last_evaluation_leaves_it_to_the_next_start(tiny, tmp_path):
    trial, build = tiny({"train.steps": 4}), setup.build

    def interrupted(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.on_progress = lambda doing, _: os.kill(os.getpid(), signal.SIGINT) if doing == "evaluation" else None
        return trainer

    with mock.patch.object(setup, "build", interrupted):
        first = run.train(trial, tmp_path / "interrupted", device="cpu")
    assert (first.state, first.state_reason) == (
        "RUNNING",
        "interrupted at step 4; the same command goes on from there",
    )
    reports = []
    for place in ("interrupted", "whole"):
        assert run.train(trial, tmp_path / place, device="cpu").state == "COMPLETED"
        record = results.read_trial(tmp_path / place / "records" / f"{trial.trial_id}.parquet")
        reports.append([(report.step, report.fid) for report in results.reports_of(record)])
    assert reports[0] == reports[1]
    assert [step for step, _ in reports[0]] == [4]


def test_a_report_that_was_lost_beside_its_checkpoint_is_made_again(tiny, rigl, tmp_path, monkeypatch):
    trial = tiny(rigl, {"sparse.prune_schedule": "stall", "sparse.stall_reports": 1})
    record = tmp_path / "records" / f"{trial.trial_id}.parquet"
    run.train(trial, tmp_path, device="cpu")
    *_, whole = results.reports_of(results.read_trial(record))
    checkpoint = state.latest(tmp_path / "checkpoints" / trial.trial_id)
    tensors, engine = tensors_of(checkpoint), state.read(checkpoint, "engine", state.manifest(checkpoint))["engine"]
    record.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_asked_in_evaluation", lambda self: True)
        assert run.train(trial, tmp_path, device="cpu").state == "RUNNING"
    assert run.train(trial, tmp_path, device="cpu").state == "COMPLETED"
    (again,) = results.reports_of(results.read_trial(record))
    assert (again.step, again.fid, again.kid) == (12, whole.fid, whole.kid)
    assert again.train_loss is None
    assert_same(tensors_of(checkpoint), tensors)
    assert state.read(checkpoint, "engine", state.manifest(checkpoint))["engine"]["clock"] == engine["clock"]
    heard = []
    run.train(trial, tmp_path, device="cpu", on_report=heard.append)
    assert heard == []


@pytest.mark.slow
def test_two_workers_are_interrupted_resume_and_die_together(tiny, tmp_path):
    trial, heard = tiny({"train.steps": 4000, "evaluate.every_steps": 20}), []

    def interrupt(report):
        heard.append(report.step)
        if len(heard) == 1:  # the ranks may report once more before they hear of it; a second signal ends at once
            os.kill(os.getpid(), signal.SIGINT)

    def kill(report):
        heard.append(report.step)
        for child in multiprocessing.active_children():
            if child.name == "worker 1":
                child.kill()

    first = run.train(trial, tmp_path, workers=2, device="cpu", on_report=interrupt)
    assert first.state == "RUNNING"
    stopped = state.manifest(state.latest(tmp_path / "checkpoints" / trial.trial_id))["step"]
    assert first.state_reason == f"interrupted at step {stopped}; the same command goes on from there"
    assert stopped > heard[-1]
    with pytest.raises(RuntimeError, match=r"worker \d"):
        run.train(trial, tmp_path, workers=2, device="cpu", on_report=kill)
    assert heard == [*range(20, heard[-1] + 1, 20)]  # no report twice, none left out
    assert heard[-1] >= stopped  # at it where the evaluation of that step was interrupted: it is done now
    assert not multiprocessing.active_children()


def test_of_a_killed_rank_its_death_is_told_and_not_what_the_others_say():
    killed, beside = mock.Mock(exitcode=-signal.SIGKILL), mock.Mock(exitcode=1)
    killed.name, beside.name, end = "worker 1", "worker 0", threading.Event()
    for said, raised, words in [
        ([], WorkerDied, "worker 1 died with exit code -9; the work ended, run it again to resume"),
        ([RuntimeError("Connection closed by peer")], WorkerDied, "worker 1 died with exit code -9"),
        ([RuntimeError("Connection closed by peer"), UsageError("a file is damaged")], UsageError, "a file is damaged"),
    ]:
        messages = queue.Queue()
        for word in said:
            messages.put(word)
        with pytest.raises(raised, match=words):
            ranks._listen([beside, killed], messages, end, end, print)
    messages.put(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        ranks._listen([beside], messages, end, end, print)


def test_ranks_that_do_not_stop_talking_are_interrupted_all_the_same():
    """A signal is looked for between what `_heard` gives."""
    said = mock.MagicMock(**{"get.return_value": "a report"})
    assert set(ranks._heard(said, wait_s=0.5, to_the_end=False)) == {"a report"}
    said.get.side_effect = ["a report"] * 1000 + [queue.Empty]
    assert len([*ranks._heard(said, wait_s=1e-9, to_the_end=True)]) == 1000


def test_a_diverged_trial_fails_with_its_reason(tiny, tmp_path):
    trial = tiny(SGD, {"optimizer.lr": 1e35, "optimizer.weight_decay": 1.0})
    outcome = run.train(trial, tmp_path, device="cpu")
    assert outcome.state == "FAILED"
    assert outcome.state_reason.startswith("loss became")
    assert run.train(trial, tmp_path, device="cpu") == outcome  # it does not start anew
    (report,) = results.reports_of(results.read_trial(tmp_path / "records" / f"{trial.trial_id}.parquet"))
    assert report.diverged


def test_what_a_killed_process_left_of_a_record_is_removed(tiny, tmp_path):
    trial = tiny({"train.steps": 1})
    leftover = tmp_path / "records" / f".{trial.trial_id}.parquet.x1y2z3.tmp"  # as files.atomic_path names it
    leftover.parent.mkdir()
    leftover.write_text("half")
    run.train(trial, tmp_path, device="cpu")
    assert [path.name for path in leftover.parent.iterdir()] == [f"{trial.trial_id}.parquet"]


@contextlib.contextmanager
def trained_elsewhere(trial, out, workers):
    """`raysparse train` in another process, past its first report; killed at the end. -> the id of the writing one."""
    path = out.with_suffix(".yaml")
    path.write_text(trial.dump_json())
    words = ["train", str(path), "--output", str(out), "--workers", str(workers), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "raysparse.cli", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert any("step 4/" in line for line in process.stderr)
        holder = int((out / "trials" / trial.trial_id / "lock").read_text().split()[0])
        assert (holder == process.pid) == (workers == 1)
        yield process, holder
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_trial_is_trained_by_one_process_at_a_time(tiny, tmp_path, monkeypatch):
    trial, out = tiny({"train.steps": 100_000}), tmp_path / "out"
    monkeypatch.setattr(claims, "ORPHAN_S", 0.2)
    with trained_elsewhere(trial, out, workers=1) as (process, _):
        written = [out / "records" / f".{trial.trial_id}.parquet.x1y2z3.tmp"]
        written += [out / "checkpoints" / trial.trial_id / f"{state.TEMPORARY}x1y2z3"]
        for path in written:
            path.touch()
        for resume in (True, False):
            with pytest.raises(UsageError, match=rf"is being trained in {out} by another process: {process.pid} "):
                run.train(trial, out, device="cpu", resume=resume)
        assert all(path.exists() for path in written)
        assert process.poll() is None
        run.train(tiny({"train.steps": 1}), out, device="cpu")  # another trial
    stop = mock.Mock(side_effect=lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert run.train(trial, out, device="cpu", on_report=stop).state == "RUNNING"
    assert stop.called


@pytest.mark.slow
def test_ranks_of_a_killed_run_end_before_the_next_one_writes(tiny, tmp_path):
    trial, out, original = tiny({"train.steps": 100_000}), tmp_path / "out", setup.build
    holders, steps = [], []

    def build(*arguments, **options):
        holders.append(int((out / "trials" / trial.trial_id / "lock").read_text().split()[0]))
        return original(*arguments, **options)

    def stop(report):
        steps.append(report.step)
        os.kill(os.getpid(), signal.SIGINT)

    with trained_elsewhere(trial, out, workers=2) as (process, holder), mock.patch.object(setup, "build", build):
        process.kill()
        assert run.train(trial, out, device="cpu", on_report=stop).state == "RUNNING"
    assert holders == [os.getpid()]
    assert holder != os.getpid()
    kept = results.reports_of(results.read_trial(out / "records" / f"{trial.trial_id}.parquet"))
    assert [report.step for report in kept][:2] == [4, 8]
    assert steps[0] in [report.step for report in kept]
    assert steps[0] > 4


def test_a_rank_whose_parent_died_before_it_began_stops(tmp_path):
    context = multiprocessing.get_context("spawn")
    messages, dead = context.Queue(), 2**30
    job = (f"file://{tmp_path}/meeting", "cpu", operator.methodcaller("should_stop"), (), messages, context.Event())
    process = context.Process(target=ranks._rank, args=(0, 1, *job, dead))
    process.start()
    assert messages.get(timeout=120).result is True
    process.join()
    messages.close()


def test_resume_off_starts_anew(tiny, tmp_path):
    trial, steps = tiny(), []
    for resume in (True, True, False):
        run.train(trial, tmp_path, device="cpu", resume=resume, on_report=lambda report: steps.append(report.step))
    assert steps == [4, 8, 12, 4, 8, 12]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model.options.hiden": 3}, "did you mean 'hidden'"),
        ({"data.options.spacin": 3}, "did you mean 'spacing'"),
        ({"data.train_examples": 10**6}, "data.train_examples is 1000000, but"),
        ({"evaluate.references": 10**6}, "evaluate.references is 1000000, but"),
        ({"data.source": "nowhere/at/all"}, "nowhere/at/all does not exist"),
        ({"model.name": "chirodif"}, "did you mean 'chirodiff'"),
        ({"evaluate.extractor": "oriented_energi"}, "did you mean 'oriented_energy'"),
        ({"evaluate.extractor": "sketch_inception"}, "weights"),
        ({"model.options.timesteps": 10}, "diffusion\\.timesteps 1000"),
        ({"model.options.num_classes": 3}, "the data set has no classes"),
        ({"train.compile": True}, r"chirodiff runs its GRU .* leave it out \(on a GPU train\.cuda_graph"),
        ({"evaluate.ddim_steps": 2000}, "ddim_steps 2000 is above"),
        ({"diffusion.beta_start": 0.1}, "beta_start <= beta_end"),
        ({"diffusion.beta_start": 1e-8}, "raise beta_start"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(tiny, changes, rule):
    trial = tiny()
    trial = trial.model_copy(update=_changed(trial, changes))
    with pytest.raises(UsageError, match=rule):
        _start(trial)


def _start(trial):
    setup.check(trial)
    setup.prepare_data(trial)


def _changed(trial, changes):
    ((path, value),) = changes.items()
    head, *names = path.split(".")
    section = getattr(trial, head)
    if len(names) == 2:
        names, value = names[:1], {**getattr(section, names[0]), names[1]: value}
    return {head: section.model_copy(update={names[0]: value})}


def test_a_batch_that_workers_cannot_share_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="cannot be shared by 2 workers"):
        run.train(tiny({"train.batch_size": 15}), tmp_path, workers=2, device="cpu")
    with pytest.raises(UsageError, match="4096 workers on cpu"):
        run.train(tiny({"train.batch_size": 4096}), tmp_path, workers=4096, device="cpu")
    with pytest.raises(UsageError, match="device must be"):
        run.train(tiny(), tmp_path, device="tpu")

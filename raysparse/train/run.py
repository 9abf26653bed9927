"""One trial without a cluster: in this process or on N DDP workers of this machine, resumable at any time.

OUT/records/<trial_id>.parquet        the reports, rewritten after each
OUT/checkpoints/<trial_id>/step-<k>/  the latest two checkpoints
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from raysparse import results
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.results import Facts, Outcome, Report
from raysparse.train import distributed, setup, state

KEEP_CHECKPOINTS = 2  # the latest, and the one before it in case the latest is damaged on disk
OnReport = Callable[[Report], None]


def train(
    config: TrialConfig,
    out: Path,
    *,
    workers: int = 1,
    device: str = "auto",
    resume: bool = True,
    command: str = "",
    on_report: OnReport | None = None,
) -> Outcome:
    """Train one trial to its end, or on from its last checkpoint in `out`.

    device: "cpu", "cuda" (worker i takes GPU i) or "auto". resume False: start anew; what `out` holds of this trial is
    replaced. command: kept in the records. on_report: called in this process after a report is recorded; reports made
    before a resume are not repeated.
    The first Ctrl-C (or SIGTERM) saves a checkpoint at the current step and returns an Outcome in state RUNNING; a
    second one raises KeyboardInterrupt. UsageError: bad settings, damaged files. RuntimeError: a worker died.
    """
    device = _device(device, workers)
    if config.train.batch_size % (workers * config.train.accumulate):
        raise UsageError(
            f"train.batch_size {config.train.batch_size} cannot be shared by {workers} workers x "
            f"{config.train.accumulate} accumulation steps; make it a multiple of {workers * config.train.accumulate}"
        )
    setup.check(config)
    setup.prepare_data(config)
    facts = setup.facts(config, sweep=out.name or "single", stage="single", world_size=workers, command=command)
    checkpoints = out / "checkpoints" / config.trial_id
    if not resume:
        state.keep_latest(checkpoints, 0)
    job = (config, facts, out, device)
    with _interrupts() as stop:
        if workers == 1:
            return _work(*job, 0, 1, stop.is_set, on_report or (lambda _: None))
        return _spawn(job, workers, stop, on_report or (lambda _: None))


def _work(
    config: TrialConfig,
    facts: Facts,
    out: Path,
    device: str,
    rank: int,
    world_size: int,
    should_stop: Callable[[], bool],
    on_report: OnReport,
) -> Outcome:
    """One rank's part. Record first, then checkpoint: what a resume computes again replaces the record of its step."""
    checkpoints = out / "checkpoints" / config.trial_id
    trainer = setup.build(config, device=device, rank=rank, world_size=world_size)
    trainer.should_stop = should_stop
    # Rank 0 looks, for it also removes leftovers, and all load what it found.
    found = distributed.from_rank_0(str(state.latest(checkpoints) or "") if rank == 0 else None, world_size)
    if found:
        state.load(trainer, Path(found))
    reports = _earlier(out, config, trainer.step) if rank == 0 else []

    def record(outcome: Outcome) -> Outcome:
        if rank == 0:
            results.write_trial(out, facts, outcome, reports)
        return outcome

    def checkpoint() -> None:
        state.save(trainer, state.at_step(checkpoints, trainer.step))
        if rank == 0:
            state.keep_latest(checkpoints, KEEP_CHECKPOINTS)

    record(Outcome())
    for report in trainer.run():
        reports.append(report)
        record(Outcome())
        checkpoint()
        if rank == 0:
            on_report(report)
    if trainer.totals.reason is not None:
        return record(Outcome("FAILED", state_reason=trainer.totals.reason))
    if trainer.step < config.train.steps:
        checkpoint()
        return record(Outcome(state_reason=f"interrupted at step {trainer.step}; the same command goes on from there"))
    return record(Outcome("COMPLETED"))


def _earlier(out: Path, config: TrialConfig, step: int) -> list[Report]:
    """Reports that were recorded up to a checkpoint's step."""
    path = out / "records" / f"{config.trial_id}.parquet"
    if step == 0 or not path.is_file():
        return []
    return [report for report in results.reports_of(results.read_trial(path)) if report.step <= step]


def _spawn(job: tuple[Any, ...], workers: int, stop: threading.Event, on_report: OnReport) -> Outcome:
    """Run the ranks in processes of their own. The death of one ends all."""
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/rendezvous"
        ranks = [
            context.Process(target=_rank, args=(rank, workers, meeting, job, messages, stopping), name=f"worker {rank}")
            for rank in range(workers)
        ]
        try:
            for process in ranks:
                process.start()
            return _listen(ranks, messages, stop, stopping, on_report)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _listen(ranks: list[Any], messages: Any, stop: threading.Event, stopping: Any, on_report: OnReport) -> Outcome:
    """Pass on what the ranks say until all have ended. UsageError or RuntimeError as soon as one has died."""
    outcome = None
    while True:
        if stop.is_set():
            stopping.set()
        died = [process for process in ranks if process.exitcode]
        ended = all(process.exitcode == 0 for process in ranks)
        heard = list(_heard(messages, wait_s=0.5 if died else 0.1))  # after the exit codes: last words are in the queue
        for message in heard:
            if isinstance(message, Report):
                on_report(message)
            elif isinstance(message, Outcome):
                outcome = message
        complaints = sorted((m for m in heard if isinstance(m, Exception)), key=lambda e: not isinstance(e, UsageError))
        if complaints:
            raise complaints[0]
        if died:
            raise RuntimeError(
                f"{died[0].name} died with exit code {died[0].exitcode}; the trial ended, run it again to resume"
            )
        if ended:
            assert outcome is not None  # rank 0 says it before it ends
            return outcome


def _heard(messages: Any, wait_s: float) -> Iterator[Any]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield messages.get(timeout=wait_s)


def _rank(rank: int, workers: int, meeting: str, job: tuple[Any, ...], messages: Any, stopping: Any) -> None:
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent hears them, and tells all ranks through `stopping`
    config, facts, out, device = job
    if device == "cuda":
        device = f"cuda:{rank}"

    def should_stop() -> bool:
        return bool(stopping.is_set()) or os.getppid() != parent  # a killed parent leaves no orphan that trains on

    try:
        distributed.init(rank, workers, meeting, device)
        outcome = _work(config, facts, out, device, rank, workers, should_stop, messages.put)
        distributed.cleanup()
    except UsageError as error:
        messages.put(error)
        raise SystemExit(2) from None
    except Exception:
        messages.put(RuntimeError(f"worker {rank} failed, the trial ended:\n{traceback.format_exc()}"))
        raise SystemExit(1) from None
    if rank == 0:
        messages.put(outcome)
    messages.close()
    messages.join_thread()  # what was put is on its way
    distributed.end_process()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the next one acts as it did before. Main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        stop.set()
        for known, handler in before.items():
            signal.signal(known, handler)

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device(device: str, workers: int) -> str:
    """cpu or cuda. UsageError where the machine has less than the workers need."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu, cuda or auto, got {device!r}")
    there = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    if not 1 <= workers <= there:
        what = "GPUs" if device == "cuda" else "CPUs"
        raise UsageError(f"{workers} workers on {device}, but this machine has {there} {what}: one worker needs one")
    return device

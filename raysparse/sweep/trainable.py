"""What runs in a trial's process: build, go on from the last checkpoint, train, and say each report.

    trials/<id>/trial.json       the TrialConfig, written by the driver
                reports.jsonl    what the trial has reported; written before its checkpoint, which is before Tune hears
                samples/<step>.png
                lock             held by the process that trains; a second one ends the first
                error.txt        the traceback of a trial that failed
    checkpoints/<id>/step-<k>/   the last two
    (leaving.py adds what is said between driver and trial when one is to leave)

A driver or worker may be killed between any two of these writes. A restarted trial says all reports up to its
checkpoint again, and the driver passes over the ones it knows: nothing is lost, and at most one evaluation interval is
computed twice, to the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import os
import platform
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raysparse import config as settings
from raysparse.errors import OtherCheckpoint, UsageError
from raysparse.files import atomic_path, remove_leftovers
from raysparse.resources import Resources
from raysparse.results import Report
from raysparse.sweep import leaving, pulse, trial_log
from raysparse.sweep.patience import passing, patiently
from raysparse.sweep.scheduler import last_line
from raysparse.train import claims, folders

KEEP_CHECKPOINTS = 2  # the last, and the one before in case the last is damaged

Metrics = dict[str, Any]


def train(config: dict[str, Any]) -> None:
    """Tune's function trainable for trials of one worker."""
    from ray import tune

    train_rank(config, tune.report, device="cuda" if config["gpus_per_worker"] else "cpu")


@trial_log.kept
def train_rank(
    config: dict[str, Any], say: Callable[[Metrics], Any], *, rank: int = 0, world_size: int = 1, device: str = "cpu"
) -> None:
    """Train one rank of the trial in `config` and `say` the metrics of each report, on all ranks alike.

    What the trial itself does wrong is said as a last report with `failed`, so that Tune does not try it again; a lost
    process or node raises in Tune, which does.
    """
    results = Path(config["results"])
    folder = results / "trials" / config["trial_id"]
    try:
        with claimed(folder) if rank == 0 else contextlib.nullcontext():
            for metrics in _metrics(config, folder, rank, world_size, device):
                say(metrics)
    except leaving.NodeGoes:
        raise  # to Tune or Ray Train, which start the trial elsewhere
    except Exception as error:
        if world_size > 1:
            raise  # the other ranks wait in a collective: Ray Train ends them all
        say(failure(folder, error))


def failure(folder: Path, error: BaseException) -> Metrics:
    """The last metrics of a trial that raised; the traceback goes to its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    name = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    return {"step": 0, "fid": None, "failed": name + last_line(error)}


def _metrics(config: dict[str, Any], folder: Path, rank: int, world_size: int, device: str) -> Iterator[Metrics]:
    keep_to_share(config.get("gpus_per_worker", 0))
    trial = settings.parse(json.loads((folder / "trial.json").read_text(encoding="utf-8")), config["trial_id"])
    hung = pulse.hung(folder)
    limit_s = config.get("hung_after_s", Resources().hung_after_s)
    attempt = str(config.get("attempt", os.getpid()))
    with pulse.Pulse(folder, rank, world_size, limit_s, attempt, compiles=trial.train.compile) as alive:
        yield from _trained(trial, Path(config["results"]), folder, rank, world_size, device, alive, hung)


def _trained(
    trial: settings.TrialConfig,
    results: Path,
    folder: Path,
    rank: int,
    world_size: int,
    device: str,
    alive: pulse.Pulse,
    hung: str | None,
) -> Iterator[Metrics]:
    from raysparse.train import distributed, setup, state

    give_memory_back(device)
    trainer = setup.build(trial, device=device, rank=rank, world_size=world_size)
    checkpoints = results / "checkpoints" / trial.trial_id
    load_latest(trainer, checkpoints, removes=rank == 0)
    for path in (folder / "reports.jsonl", folder / "samples" / "*") if rank == 0 else ():
        remove_leftovers(path)
    if trainer.step:
        trial_log.note(f"goes on from step {trainer.step}")
    if rank == 0 and (reason := leaving.count_start(folder, trainer.step, hung)):
        raise UsageError(reason)
    trainer.should_stop = leaving.Wish(results)
    trainer.on_progress = alive.beat

    def save() -> None:
        if rank == 0:
            place, what = state.at_step(checkpoints, trainer.step), f"checkpoint of step {trainer.step}"
            with alive.waits(f"for the {what}"):
                if patiently(lambda: state.save(trainer, place), what, needed=False):
                    state.keep_latest(checkpoints, KEEP_CHECKPOINTS)

    def said(report: Report) -> Iterator[Metrics]:
        # One that ASHA stops stays here for good: its process trains another trial, or ends.
        with alive.waits("for the sweep's driver or another rank", without_end=world_size == 1):
            yield metrics_of(report)

    # Rank 0's, for storage may show another node what was there before.
    reports = distributed.from_rank_0(read_reports(folder, samples=False) if rank == 0 else None, world_size)
    kept = [report for report in reports if report.step <= trainer.step]
    trainer.resume(kept)
    for report in kept:
        yield from said(report)
    for report in trainer.run():
        if rank == 0:
            what = f"report of step {report.step}"
            with alive.waits(f"for the {what}"):
                patiently(functools.partial(write_report, folder, report), what, needed=True)
        if not report.diverged:
            save()
        yield from said(report)
    if trainer.totals.reason is None and not trainer.finished:  # it was asked to stop
        save()
        with alive.waits("for the sweep's driver"):
            leaving.leave(results, folder, trainer.step, answers=rank == 0)
    elif rank == 0:
        leaving.clean_start(folder)


def keep_to_share(gpus: float) -> None:
    """Of a GPU that trials share, this process may hold its share of the memory and no more; gpus: `gpus_per_worker`.

    PyTorch keeps what it has freed, as much as there is: without a limit the trial that fails for want of memory may be
    the modest one beside the greedy one. Each process's CUDA context, some hundred MB, is not counted.
    """
    if 0 < gpus < 1:
        import torch

        torch.cuda.set_per_process_memory_fraction(gpus)


def give_memory_back(device: str) -> None:
    """What the trial before this one has freed, to the system and to the trials that share its GPU.

    glibc keeps it in an arena of each thread, and each trial has threads of its own: a process that trained four trials
    of 25 thousand weights held 3.3 GB, and 2.0 at most with this (1.4 between two trials; .7 before the first).
    """
    if device.startswith("cuda"):  # Ray Train's have a number
        import torch

        gc.collect()  # a recorded network and what it calls know each other, and hold their memory on the GPU
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def load_latest(trainer: Any, checkpoints: Path, *, removes: bool) -> None:
    """Put the trainer where its last whole checkpoint is, or leave it at step 0.

    removes: rank 0 also removes what is damaged or half written. OSError: storage that failed for minutes; what cannot
    be read now is no reason to remove it, nor to go back further than the other ranks. OtherCheckpoint: it stays.
    """
    from raysparse.train import state

    if removes:
        state.remove_leftovers(checkpoints)
    for path in reversed(folders.checkpoints(checkpoints)):
        try:
            patiently(functools.partial(_load, trainer, path), f"{path}", needed=True, done="read")
            return
        except OtherCheckpoint:
            raise
        except UsageError as error:
            trial_log.note(f"{error}; going back to the checkpoint before it")
            if removes:
                shutil.rmtree(path, ignore_errors=True)


def _load(trainer: Any, path: Path) -> None:
    """UsageError where the checkpoint is damaged, OSError where its storage fails."""
    from raysparse.train import state

    try:
        state.load(trainer, path)
    except UsageError as error:
        if isinstance(error.__cause__, OSError) and passing(error.__cause__):
            raise error.__cause__ from None
        raise


def metrics_of(report: Report) -> Metrics:
    """A report as Tune gets it: numbers for TensorBoard, no picture, and `failed` where the trial is lost.

    A NaN would pass every cutoff of ASHA, so a lost trial's FID is None: `scheduler.Rungs` ends it before one is asked.
    """
    metrics = {name: value for name, value in dataclasses.asdict(report).items() if name != "samples_png"}
    if report.diverged:
        metrics["failed"] = report.reason or "diverged"
    return metrics


def write_report(folder: Path, report: Report) -> None:
    """Keep a report for a driver that may not hear it now; the last one of a step counts."""
    if report.samples_png is not None:
        with atomic_path(folder / "samples" / f"{report.step}.png") as temporary:
            temporary.write_bytes(report.samples_png)
    kept = {known.step: known for known in read_reports(folder, samples=False)} | {report.step: report}
    lines = []
    for step in sorted(kept):
        if step <= report.step:  # later ones are of a run that went on from here before
            lines.append(json.dumps(dataclasses.asdict(dataclasses.replace(kept[step], samples_png=None))) + "\n")
    with atomic_path(folder / "reports.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def read_reports(folder: Path, *, samples: bool = True) -> list[Report]:
    """The reports that a trial has kept, by step. UsageError naming the line that is damaged."""
    path = folder / "reports.jsonl"
    if not path.is_file():
        return []
    reports = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            reports.append(Report(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{path}, line {number} is damaged ({last_line(error)}): restore it from a copy; or remove it and the "
                f"trial's folder in checkpoints, and the trial begins anew"
            ) from None
    return [with_samples(folder, report) for report in reports] if samples else reports


def with_samples(folder: Path, report: Report) -> Report:
    """The report with its picture from the trial's folder, where there is one."""
    path = folder / "samples" / f"{report.step}.png"
    return dataclasses.replace(report, samples_png=path.read_bytes()) if path.is_file() else report


def claimed(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The right to train this trial. A process of a killed sweep that still has it gets 10 s to end, then is ended."""
    return claims.claimed(folder, lambda holder: _end(holder, folder))


def _end(holder: str, folder: Path) -> None:
    """End the process that holds a trial's lock: it wrote its own id there, so it is this sweep's."""
    process, _, host = holder.partition(" ")
    if host != platform.node() or not process.isdigit() or int(process) == os.getpid():
        raise RuntimeError(f"another process trains this trial: {holder or 'unknown'} holds {folder / 'lock'}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(process), signal.SIGKILL)

"""Work shared by the ranks of one machine: in this process, or in processes of their own that live and die together."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from raysparse.errors import UsageError, WorkerDied
from raysparse.train import distributed

Say = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Member:
    """What a rank knows of itself. say: to the caller's process; should_stop: whether the work was interrupted."""

    rank: int
    world_size: int
    device: str  # "cpu" or "cuda:2"
    should_stop: Callable[[], bool]
    say: Say


@dataclasses.dataclass(frozen=True)
class _Done:
    """A rank's last word."""

    result: Any


def run(work: Callable[..., Any], job: tuple[Any, ...], workers: int, device: str, on_message: Say) -> Any:
    """work(member, *job) on every rank; -> rank 0's result.

    work: a function that can be pickled, like the job, where there are several workers. on_message: called in this
    process with what ranks say. The first Ctrl-C (or SIGTERM) makes `should_stop` true, a second one raises
    KeyboardInterrupt. UsageError: a rank's. RuntimeError: a rank raised or died (WorkerDied), which ends all.
    """
    with _interrupts() as stop:
        if workers == 1:
            return work(Member(0, 1, device, stop.is_set, on_message), *job)
        return _spawn(work, job, workers, device, stop, on_message)


def _spawn(
    work: Callable[..., Any], job: tuple[Any, ...], workers: int, device: str, stop: threading.Event, on_message: Say
) -> Any:
    """Run the ranks in processes of their own. The death of one ends all."""
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/rendezvous"
        ranks = [
            context.Process(
                target=_rank,
                args=(rank, workers, meeting, device, work, job, messages, stopping, os.getpid()),
                name=f"worker {rank}",
            )
            for rank in range(workers)
        ]
        try:
            for process in ranks:
                process.start()
            return _listen(ranks, messages, stop, stopping, on_message)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _listen(ranks: list[Any], messages: Any, stop: threading.Event, stopping: Any, on_message: Say) -> Any:
    """Pass on what the ranks say until all have ended. UsageError or RuntimeError as soon as one has died."""
    done: _Done | None = None
    while True:
        if stop.is_set():
            stopping.set()
        died = [process for process in ranks if process.exitcode]
        ended = all(process.exitcode == 0 for process in ranks)
        # After the exit codes: last words are in the queue.
        heard = list(_heard(messages, wait_s=0.5 if died else 0.1, to_the_end=bool(died) or ended))
        for message in heard:
            if isinstance(message, _Done):
                done = message
            elif not isinstance(message, Exception):
                on_message(message)
        complaints = sorted((m for m in heard if isinstance(m, Exception)), key=lambda e: not isinstance(e, UsageError))
        killed = [process for process in died if process.exitcode == -signal.SIGKILL]
        # The ranks beside a killed one raise as well, in their collective: that is no cause.
        if complaints and (isinstance(complaints[0], UsageError) or not killed):
            raise complaints[0]
        if died:
            first = (killed or died)[0]
            raise WorkerDied(
                f"{first.name} died with exit code {first.exitcode}; the work ended, run it again to resume"
            )
        if ended:
            assert done is not None  # rank 0 says it before it ends
            return done.result


def _heard(messages: Any, wait_s: float, *, to_the_end: bool) -> Iterator[Any]:
    """What is said until there is silence for so long; at most for twice as long unless to the end, as a signal may
    have come while ranks talk.
    """
    until = math.inf if to_the_end else time.monotonic() + wait_s
    with contextlib.suppress(queue.Empty):
        while time.monotonic() < until:
            yield messages.get(timeout=wait_s)


def _rank(
    rank: int,
    workers: int,
    meeting: str,
    device: str,
    work: Callable[..., Any],
    job: tuple[Any, ...],
    messages: Any,
    stopping: Any,
    parent: int,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent hears them, and tells all ranks through `stopping`
    if device == "cuda":
        device = f"cuda:{rank}"

    def should_stop() -> bool:
        return bool(stopping.is_set()) or os.getppid() != parent  # a killed parent leaves no orphan that trains on

    try:
        distributed.init(rank, workers, meeting, device)
        result = work(Member(rank, workers, device, should_stop, messages.put), *job)
        distributed.cleanup()
    except UsageError as error:
        messages.put(error)
        raise SystemExit(2) from None
    except Exception:
        messages.put(RuntimeError(f"worker {rank} failed, the work ended:\n{traceback.format_exc()}"))
        raise SystemExit(1) from None
    if rank == 0:
        messages.put(_Done(result))
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


def checked_device(device: str, workers: int) -> str:
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

"""One rank of a trial in a process of its own, which hangs as it is told: `hanging.py FOLDER TRIAL RANK RANKS HOW`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from raysparse.sweep import patience
from raysparse.sweep.trainable import train_rank
from raysparse.train import distributed, evaluate, loop, state

LIMIT_S = 1.5
AT_STEP = 3


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


HOW: dict[str, Callable[[], Any]] = {
    "sleep": lambda: time.sleep(1e6),
    "lock": lambda: [lock := threading.Lock(), lock.acquire(), lock.acquire()],  # a deadlock
    "C call": lambda: ctypes.PyDLL(None).sleep(1000),  # and holds the interpreter: no other thread of it runs
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def hang(how: Callable[[], Any]) -> None:
    train_step = loop.Trainer._train_step

    def step(trainer: loop.Trainer) -> Any:
        if trainer.step == AT_STEP:
            how()
        return train_step(trainer)

    loop.Trainer._train_step = step  # type: ignore[method-assign]


def slow(seconds: float) -> None:
    """All that may take long and is no hang, each for twice as long as a sleeping rank may."""
    train_step, save, validation_loss = loop.Trainer._train_step, state.save, evaluate.Evaluator.validation_loss
    failed: list[int] = []
    evaluated: list[int] = []

    def step(trainer: loop.Trainer) -> Any:
        if trainer.step == 0:
            busy(seconds)  # as a compiler is
        elif trainer.step in (2, 3):
            time.sleep(0.7 * LIMIT_S)  # on slow storage each step sleeps,
        elif trainer.step == AT_STEP + 1:
            time.sleep(seconds)  # and one more than others
        return train_step(trainer)

    def failing(*words: Any) -> Any:
        if len(failed) < 2:
            failed.append(1)
            raise OSError(28, "No space left on device")
        return save(*words)

    def long(self: Any, model: Any) -> float:
        if not evaluated:
            evaluated.append(1)
            busy(seconds)
        return validation_loss(self, model)

    patience.DELAYS_S = (seconds, 0.1, 0.1)  # type: ignore[assignment]
    loop.Trainer._train_step, state.save = step, failing  # type: ignore[method-assign, assignment]
    evaluate.Evaluator.validation_loss = long  # type: ignore[method-assign]


def main(results: str, trial_id: str, rank: int, ranks: int, how: str) -> None:
    if ranks > 1:
        distributed.init(rank, ranks, f"file://{results}/meeting", "cpu")
    if how == "slow":
        slow(2 * LIMIT_S)
    elif how in HOW:
        hang(HOW[how])

    def say(metrics: dict[str, Any]) -> None:
        print(json.dumps([metrics["step"], metrics.get("failed")]), file=sys.__stdout__, flush=True)
        if how == "slow" and metrics["step"] == 4:
            time.sleep(2 * LIMIT_S)  # the driver has other things to do
        if how == "stopped in a report" and metrics["step"] == AT_STEP - 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    out = sys.__stdout__ = os.fdopen(os.dup(1), "w")  # the trial's log takes the other one
    told = {"trial_id": trial_id, "results": results, "hung_after_s": LIMIT_S}
    told |= {"attempt": "1"} if ranks > 1 else {}
    train_rank(told, say, rank=rank, world_size=ranks)
    out.flush()
    distributed.end_process()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])

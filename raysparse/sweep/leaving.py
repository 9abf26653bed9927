"""How a trial's process leaves before its end: asked by the driver, or because its node is taken away.

    pause                  in the results folder, written by a driver that was interrupted: save, and wait for the end
    trials/<id>/paused     a trial's answer: its checkpoint is written
    trials/<id>/starts.json how often the trial was started since it last got further

Both ways a checkpoint is written at the step that the trial has reached, so what is lost is no evaluation interval but
less than a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from raysparse.files import write_text

PAUSE = "pause"
PAUSED = "paused"
STARTS = "starts.json"

LOOK_S = 1.0  # a trial looks for the driver's wish at most so often: on shared storage a look takes milliseconds
NOTICE_S = 5.0  # and asks Ray for a preemption notice, which is a call to the head node
ANSWER_S = 60.0  # so long the driver waits for its trials; then they go back to their last checkpoint
WAIT_S = 600.0  # so long a trial that has answered waits for its end
STARTS_LIMIT = 3  # of a trial that dies without getting further: then it is its own fault, not a machine's


class NodeGoes(Exception):
    """Raised by a trial that has saved itself because its node is being taken away: it is to go on elsewhere."""


class Wish:
    """Asked between two steps and two batches of samples: whether the trial is to save itself and leave."""

    def __init__(self, results: Path, notice: Callable[[], bool] | None = None) -> None:
        """notice: whether this node is taken away; None: Ray is asked."""
        self._pause = results / PAUSE
        self._notice = notice or node_goes
        self._looked = self._asked = float("-inf")
        self._leave = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._leave and now - self._looked >= LOOK_S:
            self._looked = now
            self._leave = self._pause.exists()
        if not self._leave and now - self._asked >= NOTICE_S:
            self._asked = now
            self._leave = self._notice()
        return self._leave


def node_goes() -> bool:
    """Whether Ray is about to take this process' node away. False outside a Ray worker."""
    import ray

    if not ray.is_initialized():
        return False
    from ray._private.state import state  # Ray Train's own get_preemption_info reads it too; Tune has no other way

    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()


def leave(results: Path, folder: Path, step: int, *, answers: bool) -> None:
    """After the checkpoint at `step`: answer the driver (where this rank `answers`) and wait for the end, or raise.

    NodeGoes: there is no pause, so the node goes. RuntimeError: a driver that asked for a pause and then forgot it.
    """
    pause = results / PAUSE
    if answers:
        clean_start(folder)
    if not pause.exists():
        raise NodeGoes(f"its node is being taken away; saved at step {step}")
    if answers:
        write_text(folder / PAUSED, f"{step}\n")
    deadline = time.monotonic() + WAIT_S
    while pause.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    raise RuntimeError("the driver asked for a pause and did not end it")


def clean_start(folder: Path) -> None:
    """The trial leaves in good order: its next start is not one after a death."""
    (folder / STARTS).unlink(missing_ok=True)


def count_start(folder: Path, step: int, hung: str | None = None) -> str | None:
    """Note a start from `step`; the reason to give up where STARTS_LIMIT starts from there have ended in a death.

    hung: where the start before this one hung, if it did.

    Machines may be lost without end in a sweep of a week; a trial that gets further in between has no part in it.
    """
    path = folder / STARTS
    at, before = _starts(path)
    before = before if at == step else 0
    if before >= STARTS_LIMIT:
        path.unlink()  # an answer to a person's `retry`: it gets as many starts again
        times = f"its process ended {before} times at or after step {step}"
        if hung:
            return f"{times} without getting further; the last time {hung}"
        return (
            f"{times} without a word and without getting further; out of memory is the usual reason, "
            f"see {folder / 'log.txt'}"
        )
    write_text(path, json.dumps({"step": step, "starts": before + 1}))
    return None


def forgive_start(folder: Path) -> None:
    """The last start ended with its driver, which was killed: that is no fault of the trial's."""
    path = folder / STARTS
    step, starts = _starts(path)
    if starts > 0:
        write_text(path, json.dumps({"step": step, "starts": starts - 1}))


def _starts(path: Path) -> tuple[int, int]:
    """The step of the last start, and how many there were from it; (0, 0) where that is not known."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return int(kept["step"]), int(kept["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


class Pause:
    """The driver's side, called between two steps of its loop: true once it may end.

    The first call after an interrupt asks the trials; true when all that run have answered, or after ANSWER_S.
    """

    def __init__(
        self,
        results: Path,
        interrupted: Callable[[], bool],
        running: Callable[[], Iterable[str]],
        asked: Callable[[], None] = lambda: None,
    ) -> None:
        """running: the ids of the trials that run now. asked: called once, when they are told to save themselves."""
        self._results, self._interrupted, self._running, self._asked = results, interrupted, running, asked
        self._deadline: float | None = None

    def __call__(self) -> bool:
        if not self._interrupted():
            return False
        if self._deadline is None:
            self._deadline = time.monotonic() + ANSWER_S
            for left in (self._results / "trials").glob(f"*/{PAUSED}"):
                left.unlink(missing_ok=True)
            write_text(self._results / PAUSE, "interrupted\n")
            self._asked()
        answered = all((self._results / "trials" / name / PAUSED).exists() for name in self._running())
        return answered or time.monotonic() > self._deadline


def forget(results: Path) -> None:
    """No pause is asked for: a driver begins, or has ended its trials."""
    (results / PAUSE).unlink(missing_ok=True)

"""The process beside a rank that notices when it hangs; see pulse.py. Standard library only: it starts in 20 ms.

A rank votes that it hangs when it has not got on for a while, and what a while is depends on what it does:

- asleep (next to no CPU time in it and its children, no thread that runs or waits for a disk): for `limit` seconds, or
  five times the longest that the same work has taken since its start;
- at work, in training steps, of which it has done some since its last report, without torch.compile: for fifty times
  the longest step, at least `limit`. On a GPU a rank spins while it waits for another: this finds a hung one there too;
- else (compiling, a long part of an evaluation, waiting for storage or other ranks, a disk that does not answer): for
  half an hour, as long as torch waits in a collective; never while a lone rank waits for the sweep's driver.

Only when all ranks vote is the trial hung: one that works or waits by right is what the others wait for. But a process
that has been stopped (SIGSTOP) for `limit` seconds hangs alone, whatever it did: what it waits for can't wake it, and
the others may wait for it by right. The first watcher that sees it writes it down, and all act on that: a stopped
process goes on for a moment to write its stacks, and what waited for it would no longer look hung. Seconds in which
this process itself did not run (a suspended machine or job, a starved one) are not counted.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

POLL_S = 1.0
LONG_S = 1800.0
PATIENCE, STEPS_PATIENCE, KNOWN_STEPS = 5, 50, 10
ASLEEP = 0.05  # of a core
TOLD_S = 4.0  # so long the ranks wait for each other's stacks, which are gone as soon as one has ended
TICKS = os.sysconf("SC_CLK_TCK")
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()  # else what a compiler's processes do is not seen


class Watch:
    """What is known of the rank; `listen` and `look` take turns."""

    def __init__(self, process: int, votes: Path, rank: int, limit_s: float, compiles: bool) -> None:
        self.process, self.vote = process, votes / f"still-{rank}"
        self.limit_s, self.compiles = limit_s, compiles
        self.doing, self.words, self.step = "wait", "", "0"
        self.longest: dict[str, float] = {}  # seconds that the same work took
        self.steps = 0
        self._begin()

    def _begin(self) -> None:
        """The rank got on just now."""
        self.quiet_s = self.cpu_s = 0.0
        self.samples = self.running = self.blocked = 0  # looks since then; at which it ran, or waited for a disk
        self.stopped_s = 0.0  # at one go, until now
        self.traced = False

    def heard(self, line: str) -> None:
        """What the rank does now."""
        doing, _, words = line.partition(" ")
        # What lies between a last step and its evaluation's first samples is neither.
        if not (self.doing == "step" and doing != "step"):
            self.longest[self.doing] = max(self.longest.get(self.doing, 0.0), self.quiet_s)
        if self.doing == doing == "step":  # which may be some steps later, see pulse.BEAT_S
            self.steps += int(words) - int(self.step)
        if doing not in ("wait", "idle"):
            self.step = words
        self.doing, self.words = doing, words
        self._begin()
        self.vote.unlink(missing_ok=True)

    def look(self, seconds: float) -> None:
        """Nothing was heard for so many seconds more."""
        if not self.samples:
            self.cpu_s = cpu_seconds(self.process)
        self.quiet_s += seconds
        states = thread_states(self.process)
        self.samples += 1
        self.running += "R" in states
        self.blocked += "D" in states
        self.traced = "t" in states
        self.stopped_s = self.stopped_s + seconds if "T" in states else 0.0

    @property
    def asleep(self) -> bool:
        if not CHILDREN:
            return False
        used = cpu_seconds(self.process) - self.cpu_s
        return used < ASLEEP * self.quiet_s and 2 * self.running < self.samples and not self.waits_for_a_disk

    @property
    def waits_for_a_disk(self) -> bool:
        return 2 * self.blocked >= self.samples > 0

    @property
    def stays_stopped(self) -> bool:
        return self.stopped_s >= self.limit_s

    @property
    def hangs(self) -> bool:
        if self.stays_stopped:
            return True
        if self.quiet_s < self.limit_s or self.traced:  # by a debugger
            return False
        if self.doing == "idle":
            return False
        longest = self.longest.get(self.doing, 0.0)
        if self.doing == "begin":
            longest = max(longest, self.longest.get("step", 0.0))
        if self.doing == "wait" or self.waits_for_a_disk:
            return self.quiet_s >= LONG_S
        if self.asleep:
            return self.quiet_s >= PATIENCE * longest
        if self.doing == "step" and not self.compiles and self.steps >= KNOWN_STEPS:
            return self.quiet_s >= STEPS_PATIENCE * longest
        return self.quiet_s >= LONG_S

    @property
    def stopped(self) -> bool:
        return "T" in thread_states(self.process)

    def describe(self) -> str:
        """`asleep at step 12 for 41 s`."""
        how = "stopped" if self.stopped else "asleep" if self.asleep else "busy"
        waiting = f", waiting {self.words}" if self.doing == "wait" else ""
        return f"{how} at step {self.step} for {self.quiet_s:.0f} s{waiting}"


def main(words: list[str]) -> None:
    process, votes, rank, ranks = int(words[0]), Path(words[1]), int(words[2]), int(words[3])
    watch = Watch(process, votes, rank, float(words[4]), words[5] == "1")
    verdict = votes / "hangs"
    rest = b""
    while True:
        began = time.monotonic()
        if select.select([0], [], [], POLL_S)[0]:
            data = os.read(0, 65536)
            if not data:  # the rank has ended, or is done
                watch.vote.unlink(missing_ok=True)
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                watch.heard(line.decode(errors="replace"))
        else:
            watch.look(min(time.monotonic() - began, 2 * POLL_S))
            if not watch.hangs:
                watch.vote.unlink(missing_ok=True)
            elif not watch.vote.exists():
                votes.mkdir(exist_ok=True)
                watch.vote.touch()
            elif watch.stays_stopped or all((votes / f"still-{each}").exists() for each in range(ranks)):
                verdict.touch()
        if verdict.exists():
            end(watch, votes, rank, ranks, log=Path(words[6]), number=int(words[7]))
            return


def end(watch: Watch, votes: Path, rank: int, ranks: int, log: Path, number: int) -> None:
    """Write the rank's stacks and where it stands; when all ranks have, end it."""
    stood, told = watch.describe(), [votes / f"told-{each}" for each in range(ranks)]
    others = told[:rank] + told[rank + 1 :]
    if watch.stopped:
        await_all(others)  # before it goes on, which it has to for its stacks
    before = size(log)
    append(log, f"rank {rank} hangs: {stood}. The stacks of its threads:\n")
    os.kill(watch.process, number)
    os.kill(watch.process, signal.SIGCONT)
    # The newest thread is written first: the one that trains may be the last. Half of the time that others wait.
    deadline = time.monotonic() + TOLD_S / 2
    while not innermost(since(log, before)) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)  # the rest of what is being written
    place = innermost(since(log, before))
    write(told[rank], f"rank {rank} {stood}" + (f" in {place}" if place else ""))
    await_all(others)
    said = "; ".join(path.read_text() for path in told if path.exists())
    logs = ", ".join("log.txt" if each == 0 else f"log-{each}.txt" for each in range(ranks))
    write(log.parent / "hung.txt", f"it hung: {said}; the stacks of all threads are in {log.parent}: {logs}\n")
    with contextlib.suppress(ProcessLookupError):
        os.kill(watch.process, signal.SIGKILL)


def await_all(paths: list[Path]) -> None:
    """Until they are there, or TOLD_S."""
    deadline = time.monotonic() + TOLD_S
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.02)


FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


def innermost(stacks: str) -> str | None:
    """`wait at store.py:40`: the last call of the thread that trains."""
    for thread in re.split(r"\n(?=Current thread|Thread )", stacks):
        frames = FRAME.findall(thread)
        if any(name == "train_rank" for _, _, name in frames):
            file, line, name = frames[0]
            return f"{name} at {Path(file).name}:{line}"
    return None


def cpu_seconds(process: int) -> float:
    """Of a process and all that it has started, itself included; 0 where it is gone."""
    total, todo = 0.0, [process]
    while todo:
        each = todo.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / TICKS  # user and system, its own and of children that ended
            for thread in Path(f"/proc/{each}/task").iterdir():
                todo += [int(child) for child in (thread / "children").read_text().split() if int(child) != os.getpid()]
    return total


def thread_states(process: int) -> set[str]:
    """R runs or would, S sleeps, D waits for a disk, T is stopped; of all threads of a process."""
    states = set()
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(OSError):
                states.add((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return states


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def since(path: Path, place: int) -> str:
    with path.open("rb") as stream:
        stream.seek(place)
        return stream.read().decode(errors="replace")


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def write(path: Path, text: str) -> None:
    """Whole or absent: the other ranks' watchers look for it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, ProcessLookupError):
        main(sys.argv[1:])
